"""A study as units: what arms share and in what they differ, what a change makes anew, and the hash of the code."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import pear
import pear_kernels
from pear.replicate import units as module
from pear.replicate.graph import unit_keys
from pear.replicate.study import RL, Calibration, Evaluation, Study, Taught
from pear.replicate.units import SHOWING, calibration_units, code_hash, study_units

STUDY = Study(
    study="tiny",
    task="countdown",
    student=Taught(styles={"forward": 1.0}, steps=5),
    teacher=Taught(styles={"backward": 1.0}, steps=7),
    arms={
        "sft": {"weighting": "none"},
        "pear-token": {"weighting": "pear", "level": "token"},
        "dft": {"weighting": "dft"},
    },
    seeds=3,
    ablations={"gamma-1": {"weighting": "pear", "gamma": 1.0}, "again": {"weighting": "none"}},
    ablation_seeds=2,
    calibration=Calibration(seeds=[100, 101], try_rl=[{}, {"learning_rate": 1e-3}, {"updates": 4, "rounds": 3}]),
)
ARM_PHASES = ("sft", "rl", "before", "after", "diagnose")


def keys(study: Study, code: str = "code") -> dict[str, str]:
    return unit_keys(study_units(study), code)


def changes(one: Study, other: Study) -> set[str]:
    """Names of units whose key is another one, or that are in one of them alone."""
    a, b = keys(one), keys(other)
    return {name for name in a | b if a.get(name) != b.get(name)}


def kind(name: str) -> str:
    return name.split("/")[0]


# ---- which units there are


def test_every_arm_and_seed_has_its_units_and_no_others():
    names = [unit.name for unit in study_units(STUDY)]
    expected = set()
    for seed in range(3):
        expected |= {f"student/{seed}", f"teacher/{seed}", f"traces/{seed}"}
        expected |= {f"start/student/{seed}", f"start/teacher/{seed}"}
        for arm in ("sft", "pear-token", "dft", *(("gamma-1", "again") if seed < 2 else ())):
            expected |= {f"{phase}/{arm}/{seed}" for phase in ARM_PHASES}
    assert sorted(names) == sorted(expected)
    seeds = [int(name.split("/")[-1]) for name in names]
    assert seeds == sorted(seeds)  # a run cut short has whole seeds


def test_units_rest_on_those_of_their_own_arm_and_seed():
    for unit in study_units(STUDY):
        seed, arm = unit.labels["seed"], unit.labels.get("arm")
        wanted = {
            "student": (),
            "teacher": (),
            "traces": (f"teacher/{seed}", f"student/{seed}"),
            "start": (f"{arm}/{seed}",),
            "sft": (f"student/{seed}", f"traces/{seed}"),
            "rl": (f"sft/{arm}/{seed}",),
            "before": (f"sft/{arm}/{seed}",),
            "after": (f"rl/{arm}/{seed}",),
            "diagnose": (f"student/{seed}", f"sft/{arm}/{seed}", f"rl/{arm}/{seed}"),
        }[kind(unit.name)]
        assert unit.needs == wanted and unit.arguments["seed"] == seed, unit.name
        assert unit.name.endswith(f"/{seed}")


def test_seeds_may_share_students_and_traces():
    shared = replace(STUDY, bases=2)
    units = {unit.name: unit for unit in study_units(shared)}
    own = {unit.name: unit for unit in study_units(STUDY)}
    assert set(own) - set(units) == {"student/2", "teacher/2", "traces/2"} and set(units) <= set(own)
    for name, unit in units.items():
        third = name.endswith("/2")
        needs = [
            need.replace("/2", "/0") if third and kind(need) in ("student", "teacher", "traces") else need
            for need in own[name].needs
        ]
        assert list(unit.needs) == needs and replace(unit, needs=()) == replace(own[name], needs=()), name
    unit_keys(list(units.values()), "code")
    assert {name for name in changes(STUDY, shared) if name in units} == {name for name in units if name.endswith("/2")}
    assert calibration_units(shared) == calibration_units(STUDY)


# ---- arms differ in their objective alone


@pytest.mark.parametrize("seed", range(3))
def test_arms_of_a_seed_differ_in_the_options_of_their_sft_alone(seed):
    units = {unit.name: unit for unit in study_units(STUDY)}
    arms = [arm for arm in STUDY.all_arms if seed in STUDY.seeds_of(arm)]
    for phase in ARM_PHASES:
        same = [units[f"{phase}/{arm}/{seed}"] for arm in arms]
        assert len({unit.function for unit in same}) == 1
        arguments = [dict(unit.arguments) for unit in same]
        if phase == "sft":
            assert [each.pop("options") for each in arguments] == [STUDY.all_arms[arm] for arm in arms]
        assert all(each == arguments[0] for each in arguments), phase
        assert not any(arm in repr(arguments) for arm in arms if arm not in ("sft",))  # no phase knows its arm
    tuned = units[f"rl/{arms[0]}/{seed}"].arguments
    assert tuned["rl"] == asdict(STUDY.rl) and "options" not in tuned


def test_seeds_of_an_arm_differ_in_the_seed_alone():
    units = {unit.name: unit for unit in study_units(STUDY)}
    for unit in units.values():
        base, _, seed = unit.name.rpartition("/")
        assert unit.arguments == units[f"{base}/0"].arguments | {"seed": int(seed)}


def test_every_model_answers_the_same_test_problems():
    told = [unit.arguments for unit in study_units(STUDY) if kind(unit.name) in ("start", "before", "after")]
    for key in ("task", "config", "evaluation", "max_new_tokens", "generate_batch", "model"):
        assert all(each[key] == told[0][key] for each in told), key


# ---- what a change makes anew


def test_settings_of_rl_concern_what_comes_after_it():
    names = {unit.name for unit in study_units(STUDY)}
    for rl in (RL(rounds=61), RL(learning_rate=1e-3), RL(beta=0.1)):
        assert changes(STUDY, replace(STUDY, rl=rl)) == {n for n in names if kind(n) in ("rl", "after", "diagnose")}


@pytest.mark.parametrize("arm", ["pear-token", "again"])
def test_options_of_an_arm_concern_that_arm(arm):
    group = "arms" if arm in STUDY.arms else "ablations"
    other = replace(STUDY, **{group: getattr(STUDY, group) | {arm: {"weighting": "psft"}}})
    names = {unit.name for unit in study_units(STUDY)}
    assert changes(STUDY, other) == {name for name in names if name.split("/")[1] == arm}


def test_one_more_arm_or_seed_leaves_what_was_there():
    before = keys(STUDY)
    more = keys(replace(STUDY, seeds=4, arms=STUDY.arms | {"psft": {"weighting": "psft"}}, ablation_seeds=3))
    assert before.items() <= more.items() and len(more) > len(before)
    assert not changes(
        STUDY, replace(STUDY, study="other", notes="notes.md", fixed_in_advance=["All."], ablation_seeds=2)
    )


def test_how_the_teacher_learns_concerns_all_but_the_student():
    other = replace(STUDY, teacher=replace(STUDY.teacher, steps=8))
    names = {unit.name for unit in study_units(STUDY)}
    assert changes(STUDY, other) == {n for n in names if not n.startswith(("student/", "start/student/"))}


def test_the_number_of_test_problems_concerns_no_training():
    other = replace(STUDY, evaluation=Evaluation(problems=50))
    assert {kind(name) for name in changes(STUDY, other)} == {"start", "before", "after", "diagnose"}
    assert set(keys(STUDY, "other code").values()).isdisjoint(keys(STUDY).values())


# ---- calibration


def test_calibration_has_the_baseline_alone_on_seeds_of_its_own():
    units = calibration_units(STUDY)
    by_name = {unit.name: unit for unit in units}
    assert {unit.labels["seed"] for unit in units} == {100, 101}
    assert {unit.labels.get("arm") for unit in units} == {"student", "teacher", "sft", None}
    assert not set(by_name) & {unit.name for unit in study_units(STUDY)}
    options = [unit.arguments["options"] for unit in units if kind(unit.name) == "sft"]
    assert options == [{"weighting": "none"}] * 2  # of both seeds
    assert not any(arm in repr(units) for arm in ("pear-token", "dft", "gamma-1", "again"))
    for seed in (100, 101):
        tried = [by_name[f"rl/setting-{i}/{seed}"] for i in range(3)]
        assert all(unit.needs == (f"sft/sft/{seed}",) for unit in tried)
        assert [unit.arguments["rl"] for unit in tried] == [
            asdict(RL()),
            asdict(RL(learning_rate=1e-3)),
            asdict(RL(updates=4, rounds=3)),
        ]
        assert by_name[f"before/sft/{seed}"].needs == (f"sft/sft/{seed}",)
        for i in range(3):
            assert by_name[f"after/setting-{i}/{seed}"].needs == (f"rl/setting-{i}/{seed}",)
    unit_keys(units, "code")  # a set of units that can be run


def test_calibration_is_what_the_study_does_but_for_seed_and_rl():
    study = {unit.name: unit for unit in study_units(STUDY)}
    for unit in calibration_units(STUDY):
        name = unit.name.replace("/100", "/0").replace("/101", "/0")
        twin = study[name if "setting" not in name else f"{kind(name)}/sft/0"]
        arguments = twin.arguments | {"seed": unit.labels["seed"]}
        if kind(name) == "rl":
            arguments |= {"rl": unit.arguments["rl"]}
        assert (unit.function, unit.arguments) == (twin.function, arguments)


# ---- the code


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """Copies of both packages' sources, in the place of those that are hashed."""
    for package in (pear, pear_kernels):
        source = Path(package.__file__).parent
        for path in source.rglob("*.py"):
            copy = tmp_path / package.__name__ / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        copied = SimpleNamespace(__file__=str(tmp_path / package.__name__ / "__init__.py"))
        monkeypatch.setattr(module, package.__name__, copied)
    return tmp_path


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n# another line\n")


def test_the_hash_is_that_of_the_files(packages, monkeypatch):
    copied = code_hash()
    monkeypatch.undo()
    assert copied == code_hash()


def test_files_that_show_change_no_hash(packages):
    before = code_hash()
    for name in SHOWING:
        assert (packages / "pear" / name).is_file(), name
        edit(packages / "pear" / name)
    (packages / "pear" / "notes.txt").write_text("no code")
    assert code_hash() == before
    (packages / "pear" / "cli.py").unlink()
    assert code_hash() == before


def test_files_that_compute_change_the_hash(packages):
    seen = {code_hash()}
    computing = [path for path in sorted(packages.rglob("*.py")) if not is_showing(path, packages)]
    names = {path.relative_to(packages).as_posix() for path in computing}
    assert {"pear/sft.py", "pear/rl.py", "pear/replicate/phases.py", "pear_kernels/ops/__init__.py"} <= names
    assert len(computing) > 40
    for path in computing:
        edit(path)
        seen.add(code_hash())
    assert len(seen) == len(computing) + 1
    for change in (lambda: (packages / "pear/new.py").write_text(""), (packages / "pear/rl.py").unlink):
        change()
        assert code_hash() not in seen
        seen.add(code_hash())


def is_showing(path: Path, packages: Path) -> bool:
    return path.is_relative_to(packages / "pear") and path.relative_to(packages / "pear").as_posix() in SHOWING


def test_versions_change_the_hash(monkeypatch):
    before, found = code_hash(), module.versions()
    assert {"python", "torch", "transformers", "trl", "reasoning-gym"} <= set(found)
    for name in found:
        monkeypatch.setattr(module, "versions", lambda name=name: found | {name: "0.0"})
        assert code_hash() != before
    monkeypatch.setattr(module, "versions", lambda: found)
    assert code_hash() == before
