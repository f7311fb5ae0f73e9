"""Configurations: what is refused and in which words, what `fast` lays over them, and those that are shipped."""

import copy
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pear.io import DataError
from pear.replicate import replicate
from pear.replicate.study import OBJECTIVE, load_study, overlaid, with_rl
from pear.sft_config import PEARSFTConfig

EXPERIMENTS = sorted((Path(__file__).parents[3] / "experiments").glob("*.yaml"))
STUDY = {
    "study": "tiny",
    "task": "countdown",
    "student": {"styles": {"forward": 1.0}, "steps": 5},
    "teacher": {"styles": {"backward": 1.0}, "steps": 7},
    "arms": {"sft": {"weighting": "none"}, "pear-token": {"weighting": "pear", "level": "token"}},
}


@pytest.fixture
def write(tmp_path):
    """write(values) -> a YAML file with them; text as it is."""

    def write(values, name: str = "study.yaml") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def changed(**changes) -> dict:
    """STUDY with other values; a key such as `rl__updates` is within another."""
    values = copy.deepcopy(STUDY)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = values
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return values


def without(key: str) -> dict:
    return {name: value for name, value in STUDY.items() if name != key}


# ---- what is read


def test_what_is_not_said_has_its_default(write):
    study = load_study(write(STUDY))
    assert (study.study, study.task, study.seeds, study.baseline) == ("tiny", "countdown", 8, "sft")
    assert (study.student.steps, study.student.batch, study.teacher.steps) == (5, 32, 7)
    assert study.arms == STUDY["arms"] and study.ablations == {} and study.evaluation.ks == [1, 8, 32]
    assert study.as_dict() == asdict(study) and study.as_dict()["rl"]["updates"] == 2


def test_numbers_are_read_as_the_type_they_are_for(write):
    text = (
        yaml.safe_dump(changed(sft__epochs=4)) + "rl: {learning_rate: 3e-5, beta: 1}\n"
    )  # YAML: a text, a whole number
    study = load_study(write(text))
    assert study.rl.learning_rate == 3e-5 and study.rl.beta == 1.0 and type(study.rl.beta) is float
    assert study.sft.epochs == 4 and study.traces.rows is None
    assert load_study(write(changed(traces__rows=50))).traces.rows == 50


def test_ablations_run_on_the_first_seeds_alone(write):
    study = load_study(write(changed(seeds=5, ablation_seeds=2, ablations__short={"weighting": "dft"})))
    assert list(study.all_arms) == ["sft", "pear-token", "short"]
    assert [list(study.seeds_of(arm)) for arm in study.all_arms] == [[0, 1, 2, 3, 4]] * 2 + [[0, 1]]


def test_settings_of_rl_are_replaced_one_by_one(write):
    study = load_study(write(changed(rl__rounds=9)))
    other = with_rl(study, {"learning_rate": "2e-4"})
    assert (other.rl.learning_rate, other.rl.rounds) == (2e-4, 9)
    assert asdict(other) | {"rl": None} == asdict(study) | {"rl": None} and study.rl.learning_rate == 5e-5
    with pytest.raises(DataError, match="calibration.try_rl: unknown key 'round'; did you mean 'rounds'?"):
        with_rl(study, {"round": 3})


# ---- fast


def test_fast_is_laid_over_the_rest(write):
    values = changed(seeds=6, rl__rounds=50, rl__updates=4, arms__dft={"weighting": "dft"})
    values["fast"] = {
        "seeds": 2,
        "rl": {"rounds": 1},
        "student": {"steps": 1},
        "ablation_seeds": 1,
        "arms": {"dft": None},
    }
    path = write(values)
    slow, fast = load_study(path), load_study(path, fast=True)
    assert (slow.seeds, slow.rl.rounds, slow.student.steps, list(slow.arms)) == (6, 50, 5, ["sft", "pear-token", "dft"])
    assert (fast.seeds, fast.rl.rounds, fast.student.steps, list(fast.arms)) == (2, 1, 1, ["sft", "pear-token"])
    assert fast.rl.updates == 4 and fast.student.styles == {"forward": 1.0} and fast.teacher == slow.teacher
    values.pop("fast")
    assert load_study(write(values)) == slow  # what is for `fast` alone changes nothing else


trees = st.recursive(
    st.integers() | st.none(), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=4), max_leaves=12
)
mappings = st.dictionaries(st.sampled_from("abcd"), trees, max_size=4)


def leaves(tree, path=()):
    """Values by their path; an empty mapping is a value."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {where: value for key, inner in tree.items() for where, value in leaves(inner, (*path, key)).items()}


@given(mappings, mappings)
def test_an_overlay_wins_where_it_says_something_and_nowhere_else(values, overlay):
    before = copy.deepcopy((values, overlay))
    merged = leaves(overlaid(values, overlay))
    assert (values, overlay) == before
    above, below = ({path: v for path, v in leaves(each).items() if path} for each in (overlay, values))

    def touch(path, other) -> bool:
        shared = min(len(path), len(other))
        return path[:shared] == other[:shared]

    for path, value in above.items():
        if value != {}:  # an empty mapping says nothing about a mapping
            assert merged[path] == value
    for path, value in below.items():
        if not any(touch(path, other) for other in above):
            assert merged[path] == value
    assert all(path in above or path in below for path in merged if path)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    study = load_study(path)
    assert study.study == path.stem
    says_fast = "fast" in yaml.safe_load(path.read_text())
    if says_fast:
        fast = load_study(path, fast=True)
        assert fast.seeds < study.seeds and fast.rl.rounds < study.rl.rounds and fast.task == study.task
        assert set(fast.arms) <= set(study.arms) and {study.baseline, study.primary.arm} <= set(fast.arms)
    else:
        with pytest.raises(DataError, match="--fast"):
            load_study(path, fast=True)


def test_there_are_shipped_configurations():
    assert {"countdown", "chain-sum"} <= {path.stem for path in EXPERIMENTS}


# ---- what is refused

REFUSED = {
    "unknown key": (changed(sead=3), "unknown key 'sead'; did you mean 'seeds'?"),
    "unknown key, nothing near": (changed(qqq=3), "unknown key 'qqq'; known: ['study', 'task', "),
    "unknown key within": (changed(rl__round=3), "rl: unknown key 'round'; did you mean 'rounds'?"),
    "missing": (without("task"), "no `task`"),
    "missing student": (without("student"), "no `student`"),
    "missing within": (changed(student={"steps": 3}), "student: no `styles`"),
    "no mapping": (changed(rl=3), "rl: must be a mapping of keys, got 3"),
    "text for a number": (changed(seeds="many"), "seeds must be a int, got 'many'"),
    "text for a share": (changed(sft__learning_rate="fast"), "sft: learning_rate must be a float, got 'fast'"),
    "truth for a number": (changed(seeds=True), "seeds must be a int, got True"),
    "fraction for a whole number": (changed(rl__rounds=1.5), "rl: rounds must be a int, got 1.5"),
    "number for a text": (changed(study=3), "study must be a str, got 3"),
    "number for a truth": (changed(cpu=1), "cpu must be a bool, got 1"),
    "number for a list": (changed(evaluation__ks=8), "evaluation: ks must be a list, got 8"),
    "list for a mapping": (changed(arms=["sft"]), "arms must be a dict, got ['sft']"),
    "null for a number": (changed(seeds=None), "seeds must be a int, got None"),
    "task": (changed(task="sudoku"), "task must be one with worked solutions (countdown, chain_sum), got 'sudoku'"),
    "name": (
        changed(study="My study"),
        "names of study and arms are of small letters, digits and hyphens, got 'My study'",
    ),
    "no name": (changed(study=""), "names of study and arms are of small letters, digits and hyphens, got ''"),
    "name of an arm": (changed(**{"arms__a/b": {}}), "got 'a/b'"),
    "name of an arm, a number": (changed(arms={"sft": {}, "pear-token": {}, 3: {}}), "got 3"),
    "arm and ablation": (changed(ablations={"sft": {}}), "'sft' is among both arms and ablations"),
    "reserved": (changed(arms__teacher={}), "no arm can be called student or teacher"),
    "baseline": (changed(baseline="dft"), "baseline must be among the arms (sft, pear-token), got 'dft'"),
    "primary": (changed(primary__arm="dft"), "primary.arm must be among the arms (sft, pear-token), got 'dft'"),
    "primary is an ablation": (changed(ablations__dft={}, primary__arm="dft"), "primary.arm must be among the arms"),
    "primary is the baseline": (
        changed(primary__arm="sft"),
        "primary.arm must be another arm than the baseline, got 'sft' for both",
    ),
    "primary k": (changed(primary__k=4), "primary.k must be one of evaluation.ks = [1, 8, 32], got 4"),
    "k": (changed(evaluation__ks=[1, 8, 64]), "evaluation.ks must lie between 1 and samples = 32, got 64"),
    "k of 0": (changed(evaluation__ks=[0, 8]), "evaluation.ks must lie between 1 and samples = 32, got 0"),
    "k no number": (changed(evaluation__ks=["8"]), "evaluation.ks must lie between 1 and samples = 32, got '8'"),
    "seeds": (changed(seeds=0), "seeds must be at least 1, got 0"),
    "bases": (changed(seeds=4, bases=5), "bases must lie between 1 and seeds = 4, got 5"),
    "tokens": (changed(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    "layers": (changed(model__layers=0), "model.layers must be at least 1, got 0"),
    "heads": (
        changed(model={"hidden_size": 36, "heads": 4}),
        "model.hidden_size must be a multiple of twice model.heads = 4, got 36",
    ),
    "dtype": (changed(model__dtype="float8"), "model.dtype must be one of float32, bfloat16, float16, got 'float8'"),
    "memorise": (changed(student__memorise=0), "student.memorise must be at least 1, got 0"),
    "steps": (changed(teacher__steps=-1), "teacher.steps must be at least 0, got -1"),
    "rate": (changed(sft__learning_rate=0), "sft.learning_rate must be more than 0, got 0.0"),
    "rate, no number": (changed(sft__learning_rate=float("nan")), "sft.learning_rate must be more than 0, got nan"),
    "rate of rl": (changed(rl__learning_rate=-1e-4), "rl.learning_rate must be more than 0, got -0.0001"),
    "beta": (changed(rl__beta=-0.1), "rl.beta must be 0 or more, got -0.1"),
    "epochs": (changed(sft__epochs=0), "sft.epochs must be at least 1, got 0"),
    "held out": (changed(traces__heldout_share=1.0), "traces.heldout_share must lie between 0 and 1, got 1.0"),
    "ablation seeds": (changed(seeds=3, ablations__dft={}), "ablation_seeds must lie between 1 and seeds = 3, got 4"),
    "ablations without seeds": (
        changed(ablation_seeds=0, ablations__dft={}),
        "ablation_seeds must lie between 1 and seeds = 8, got 0",
    ),
    "rounds": (changed(rl__rounds=0), "rl.rounds must be at least 1, got 0"),  # TRL would train for three epochs
    "group": (changed(rl__group=1), "rl.group must be at least 2, got 1"),
    "updates": (changed(rl__updates=3), "rl.updates must divide prompts x group = 128, got 3"),
    "problems": (changed(rl__problems=15), "rl.problems must be at least rl.prompts = 16, got 15"),
    "style": (changed(student__styles={"sideways": 1}), "student.styles: 'sideways' is no style of countdown"),
    "shares": (changed(teacher__styles={"forward": 0}), "teacher.styles must be shares of 0 or more, not all 0, got"),
    "share": (changed(teacher__styles={"forward": -1, "backward": 2}), "teacher.styles must be shares of 0 or more"),
    "share, no number": (changed(teacher__styles={"forward": "all"}), "teacher.styles must be shares of 0 or more"),
    "setting of the task": (
        changed(task_config__terms=3),
        "task_config: 'terms' is no setting of countdown (min_numbers",
    ),
    "calibration seed": (
        changed(calibration__seeds=[7, 100]),
        "calibration.seeds must be other than the study's, whole numbers from 8, got 7",
    ),
    "calibration seed, a text": (changed(calibration__seeds=["a"]), "calibration.seeds must be other than"),
    "calibration seed twice": (changed(calibration__seeds=[9, 9]), "calibration.seeds must be one or more, none twice"),
    "no calibration seed": (
        changed(calibration__seeds=[]),
        "calibration.seeds must be one or more, none twice, got []",
    ),
    "tried": (
        changed(calibration__try_rl=[{}, {"rate": 1}]),
        "calibration.try_rl[1]: unknown key 'rate'; known: ['rounds'",
    ),
    "tried, no mapping": (
        changed(calibration__try_rl=[3]),
        "calibration.try_rl[0] must be a mapping of settings of rl",
    ),
    "tried, out of range": (
        changed(calibration__try_rl=[{"updates": 3}]),
        "calibration.try_rl[0].updates must divide prompts x group = 128, got 3",
    ),
    "arm": (changed(arms__dft=3), "arm 'dft' must be a mapping of options of `pear sft`, got 3"),
    "option": (changed(arms__dft={"wait": 1}), "arm 'dft': 'wait' is no option of `pear sft`"),
    "value": (changed(arms__dft={"weighting": "dtf"}), "arm 'dft': weighting must be one of pear, none, dft"),
    "value of an ablation": (changed(ablations__low={"gamma": 2.0}), "arm 'low': gamma must"),
    "teacher's distribution": (
        changed(arms__kd={"distill": "forward"}),
        "arm 'kd': 'distill' is the same for all arms",
    ),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(values, message, write):
    path = write(values)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1", ": not YAML: "),
        ("- 1\n- 2\n", ": must be a YAML mapping of keys, got list"),
        ("", ": must be a YAML mapping of keys, got NoneType"),
        ("study: !!python/object:os.system x\n", ": not YAML: "),
    ],
)
def test_files_that_are_no_mapping_are_refused(text, message, write):
    path = write(text)
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
        load_study(path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'none.yaml'}: no such file (expected YAML")):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: a folder; give a file in it")):
        load_study(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("study: für\n".encode("latin-1"))
    with pytest.raises(DataError, match="latin.yaml: not UTF-8 text"):
        load_study(tmp_path / "latin.yaml")


@pytest.mark.parametrize("overlay", [{}, {"fast": None}, {"fast": 3}], ids=str)
def test_fast_needs_its_key(overlay, write):
    path = write(STUDY | overlay)
    assert load_study(path) == load_study(write(STUDY, "other.yaml"))
    with pytest.raises(DataError, match=re.escape(f"--fast: {path} has no key `fast`")):
        load_study(path, fast=True)


def test_what_fast_says_is_checked_as_well(write):
    path = write(STUDY | {"fast": {"rl": {"updates": 3}}})
    load_study(path)
    with pytest.raises(DataError, match=re.escape("rl.updates must divide prompts x group = 128, got 3")):
        load_study(path, fast=True)


# ---- arms differ by their objective alone


@pytest.mark.parametrize("group", ["arms", "ablations"])
def test_no_arm_can_change_what_is_the_same_for_all(group, write):
    for option in fields(PEARSFTConfig):  # every option of the trainer, whatever it is
        if option.name in OBJECTIVE or not option.init:
            continue
        with pytest.raises(DataError, match=f"arm 'other': '{option.name}' is the same for all arms"):
            load_study(write(changed(**{f"{group}__other": {option.name: 1}})))


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "pear", "level": "block", "block_size": 2, "gamma": 0.9},
        {"log_ratio_clip": [-0.1, 0.1], "log_weight_clip": [-3, 3]},
        {"weighting": "iw-sft", "iw_tau": 2.0, "iw_max": 4.0},
        {"weighting": "psft", "psft_clip": 0.1},
        {"weighting": "asft", "asft_kl": 0.2},
        {"weighting": "idft", "idft_clip": [0.5, 1.5]},
    ],
    ids=str,
)
def test_an_objective_can_be_any_that_the_traces_serve(options, write):
    assert load_study(write(changed(arms__other=options))).arms["other"] == options
    assert set(options) <= set(OBJECTIVE)


# ---- before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(task="chain_sum", task_config={"max_terms": 2, "max_digits": 1}, evaluation__problems=200),
            "evaluation.problems and task_config: size=200: only",
        ),
        (dict(task="chain_sum", task_config__min_terms=9), "task_config: max_terms must be >= min_terms"),
        (dict(task_config__max_numbers=4), "task_config: worked solutions of countdown are for its own configuration"),
        (dict(notes="none.md"), "notes: none.md, beside "),
    ],
)
def test_a_task_without_the_problems_is_refused_before_anything_runs(changes, message, write, tmp_path):
    values = changed(**changes)
    if values["task"] == "chain_sum":
        values |= {"student": {"styles": {"pairs": 1}, "steps": 1}, "teacher": {"styles": {"checked": 1}, "steps": 1}}
    with pytest.raises(DataError, match=re.escape(message)):
        replicate(write(values), out=tmp_path / "out", results=tmp_path / "results")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.yaml"]


@pytest.mark.parametrize("name", ["out", "results"])
def test_a_file_in_the_place_of_a_folder_is_refused(name, write, tmp_path):
    (tmp_path / "file").write_text("mine")
    folders = {"out": tmp_path / "o", "results": tmp_path / "r"} | {name: tmp_path / "file"}
    with pytest.raises(DataError, match=re.escape(f"{name}: {tmp_path / 'file'} is a file; give a folder")):
        replicate(write(STUDY), **folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "study.yaml"]
