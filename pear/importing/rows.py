"""From a generation to a scored row: with the policy's tokens where its ids and tokenizer are known, else by bytes."""

import json
from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.align import Spans, Unaligned, spans_of, spans_of_text
from pear.align.pieces import pieces_of
from pear.align.roles import END_OF_TURN, names_of
from pear.align.spans import JOINT, NO_BYTES
from pear.chat import Renderer, TemplateLimit, is_assistant
from pear.importing import checks
from pear.importing.generation import UNFINISHED, Generation, Reject, Token, completion_pieces, completion_text
from pear.importing.spelling import (
    check_all_there,
    check_prompt_ids,
    kept_of,
    roles_of,
    spelled,
    without_dummy_prefix,
)
from pear.io import DataError, check_label
from pear.models import tokenizer_fingerprint
from pear.notes import EOS, LEFT_OUT, REASONING, REWRITTEN
from pear.rows import TokenizedRow, prompt_and_completion, tokenize_row
from pear.seal import SEALED
from pear.strict_json import unwritable

_NO_IDS = "the source gives no ids"
_NO_TOKENIZER = "no --tokenizer"


class Converter:
    """Makes scored rows (unsealed), and the counts of `checks` for each.

    Args:
        tokenizer: the behaviour policy's; None gives byte rows.
        policy: its name where the data has none.
        settings: sampling settings that the data does not tell.
        stage: one of generation.STAGES; None: as the source knows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        policy: str | None = None,
        settings: dict[str, float] | None = None,
        stage: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.policy = policy
        self.settings = settings or {}
        self.stage = stage
        self.fingerprint = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        self._notes: tuple[str, ...] = ()  # of the row at hand
        if tokenizer is not None and tokenizer.chat_template is not None:
            _check_template(tokenizer)
        self.roles = None if tokenizer is None else roles_of(tokenizer)

    def row(self, generation: Generation, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scored row, and its counts.

        Raises:
            Reject: this row cannot be imported.
            DataError: no row can: nobody says whose log-probs they are.
        """
        policy = generation.policy or self.policy
        if not policy:
            raise DataError(
                f"{where}: the data does not name the model that wrote it; give --policy NAME, or `behavior_policy` in "
                "each row"
            )
        if not isinstance(policy, str):
            raise Reject(f"the behaviour policy's name must be a string, got {policy!r:.100}")
        if unwritable(policy):
            raise Reject(f"the behaviour policy's name cannot be written as JSON: {policy!r:.100} has half a character")
        if policy == "none":
            raise Reject('"behavior_policy": "none" means that no model wrote the text, but the row has log-probs')
        if self.tokenizer is not None and generation.prompt is None:
            generation.prompt = self.tokenizer.decode(generation.prompt_ids, skip_special_tokens=False)
        if generation.prompt is None:
            raise Reject("the prompt's text is not in the data, only its ids: give --tokenizer")
        text, self._notes = self._text(generation), ()
        if generation.whole:
            made, counts = self._scored_row(generation, text, where)
        elif self.tokenizer is not None and all(token.id is not None for token in generation.tokens):
            made, counts = self._token_row(generation, text, where)
        elif self.tokenizer is not None and all(token.data is None for token in generation.tokens):
            made, counts = self._encoded_row(generation, text, where)
        else:
            made, counts = self._byte_row(generation)
        spans = made["behavior_spans"]
        last = spans.get("marks", {}).get(str(len(spans.get("bytes", ())) - 1))
        if generation.written and generation.finish in UNFINISHED and last != END_OF_TURN:
            spans["cut"] = True
        if "input_ids" not in made or generation.extra.get("input_ids") != made["input_ids"]:
            text = {key: value for key, value in text.items() if key not in _OF_TOKENS}
        row = {**text, **made, "behavior_policy": policy}
        if "input_ids" in row:
            row["model"] = policy
        if noted := self._sampling(generation):
            counts["sampling"] = {json.dumps(noted, sort_keys=True): 1}
        elif generation.written:
            counts["sampling"] = {"unknown": 1}
        if generation.written and (found := checks.listed(generation, noted)):
            counts["listed"] = found
            if found["estimated"] >= 0.5 * len(generation.tokens):
                noted = noted | {"kept_mass": round(found["kept"] / found["estimated"], 4)}
        if noted:
            row["behavior_sampling"] = noted
        line = where.rpartition(":")[2]
        if self._notes:
            counts["notes"] = {note: {line: 1} for note in self._notes}
        counts["policies"] = {policy: 1}
        counts["rows"] = 1
        if generation.finish == "length":
            counts["cut at their length"] = 1
        return row, counts

    def _text(self, generation: Generation) -> dict[str, Any]:
        """The row's own keys, `prompt` and `completion`, in the form that everything else reads."""
        own = {key: value for key, value in generation.extra.items() if key not in _MADE}
        row = own | {"prompt": generation.prompt, "completion": generation.completion}
        if reason := unwritable(row):
            raise Reject(f"the row cannot be written as JSON: {reason}")
        try:
            check_label(row, "row")
            row = prompt_and_completion(row, "row")
        except DataError as error:
            raise Reject(str(error).removeprefix("row: ")) from None
        if isinstance(row["prompt"], list) and row["prompt"][-len(row["completion"]) :] == row["completion"]:
            raise Reject("the messages of the prompt end with the completion itself: leave it out of them")
        if not (generation.whole or isinstance(row["completion"], str) or all(map(is_assistant, row["completion"]))):
            raise Reject(
                "the completion has messages of others than the assistant: log-probs are of one generation, so put "
                "what came before it into the prompt"
            )
        pieces = completion_pieces(row["completion"])
        if not pieces or not all(isinstance(piece, str) for piece in pieces):
            raise Reject(f"the completion must have text to place the tokens in, got {row['completion']!r:.100}")
        return row

    def _sampling(self, generation: Generation) -> dict[str, Any]:
        if not generation.written:
            return {}
        noted: dict[str, Any] = self.settings | generation.sampling
        stage = self.stage or generation.stage
        return noted | {"logprobs": stage} if noted and stage else noted

    # -----------------------------------------------------------------------------------------------------------------

    def _byte_row(self, generation: Generation) -> tuple[dict[str, Any], dict[str, Any]]:
        if missing := [number for number, token in enumerate(generation.tokens) if token.data is None]:
            what = "an id and no text" if generation.tokens[missing[0]].id is not None else "neither text nor id"
            raise Reject(f"token {missing[0]} has {what}: give --tokenizer, or a source that tells the tokens' text")
        values = checks.check_logprobs(generation, floored=True)
        text = completion_text(generation.completion)
        data = without_dummy_prefix([token.data or b"" for token in generation.tokens], text, generation.prompt)
        check_all_there(data, text)
        kept = kept_of(data, text, generation.cut)
        try:
            spans = spans_of_text(data[:kept], completion_pieces(generation.completion))
        except Unaligned as error:
            raise Reject(str(error)) from None
        if generation.finish == "stop" and not generation.cut and not data[-1]:
            spans.marks[len(data) - 1] = END_OF_TURN  # llama.cpp tells its log-prob and not its text
        for number, value in enumerate(values[:kept]):
            if value <= checks.FLOOR:  # no value, so no ratio: its bytes are nobody's
                begin, end = spans.extents[number]
                spans.extents[number] = (begin, begin)
                # also of one that had a mark: by its role it would be matched, without bytes go with the next token
                spans.marks[number] = f"{JOINT}{end - begin}: {data[number].decode('utf-8', 'replace')}"
        why = _NO_TOKENIZER if generation.tokens[0].id is not None else _NO_IDS
        asked = {name: checks.answer(None, why) for name in _OF_IDS} | {_SPANS: checks.answer(True)}
        made = {"behavior_spans": spans.to_json() | {"logprobs": values[:kept]}}
        return made, self._counts(generation, "byte", values, kept, spans, asked)

    def _token_row(
        self, generation: Generation, text: dict[str, Any], where: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        tokenizer = self.tokenizer
        ids = [token.id for token in generation.tokens if token.id is not None]
        if beyond := [token for token in ids if not 0 <= token < len(tokenizer)]:
            raise Reject(
                f"token {beyond[0]} is not in the vocabulary of {len(tokenizer)}: is --tokenizer that of the behaviour "
                "policy?"
            )
        values = checks.check_logprobs(generation)
        content = completion_text(text["completion"])
        data, hidden = spelled(ids, tokenizer, completion_pieces(text["completion"]))
        if pieces_of(tokenizer).dummy_prefix:
            data = without_dummy_prefix(data, content, generation.prompt)
        check_all_there(data, content)
        kept = kept_of(data, content, generation.cut, self.roles[END_OF_TURN])
        ids, data, values_kept = ids[:kept], data[:kept], values[:kept]
        prompt_ids, asked = self._prompt(generation, text, ids, where)
        spans = self._spans(prompt_ids, ids, data, text, asked)
        if spans is not None:
            names = names_of(self.roles)
            for number in hidden & set(range(kept)):
                surface = tokenizer.convert_ids_to_tokens(ids[number])
                spans.marks[number] = names.get(surface, surface)
        mask = [0] * len(prompt_ids) + [1] * kept
        if not prompt_ids:  # nothing predicts the first token of all
            if kept < 2:
                raise Reject("a prompt without tokens and a completion of one: nothing predicts it")
            mask[0], values_kept = 0, values_kept[1:]
            if spans is not None:
                spans = Spans(spans.extents[1:], {number - 1: mark for number, mark in spans.marks.items() if number})
        row = {
            "input_ids": prompt_ids + ids,
            "completion_mask": mask,
            "behavior_logprobs": [0.0] * (len(mask) - len(values_kept)) + values_kept,
            "tokenizer": self.fingerprint,
            "behavior_spans": {"problem": asked.pop("problem")} if spans is None else spans.to_json(),
        }
        return row, self._counts(generation, "token", values, kept, spans, asked)

    def _spans(
        self, prompt_ids: list[int], ids: list[int], data: list[bytes], text: dict[str, Any], asked: dict[str, Any]
    ) -> Spans | None:
        """Where the ids stand in the text: as they are spelled, or by what the tokenizer's normalizer made of the text.

        Raises:
            Reject: the ids do not spell the text, and are not what the tokenizer makes of it either.
        """
        pieces = completion_pieces(text["completion"])
        asked[_OF_IDS[0]], asked[_SPANS] = checks.answer(True), checks.answer(True)
        try:
            return spans_of_text(data, pieces, self.roles)
        except Unaligned as error:
            reason = str(error)
        tokenized = TokenizedRow(prompt_ids + ids, [0] * len(prompt_ids) + [1] * len(ids), 0)
        try:
            return spans_of(text, tokenized, self.tokenizer)
        except Unaligned as error:
            if "yes" in asked[_OF_IDS[1]]:
                asked[_SPANS] = checks.answer(False)
                asked["problem"] = str(error)
                return None
        raise Reject(f"{reason} (the ids as --tokenizer spells them: is it that of the behaviour policy?)")

    def _prompt(
        self, generation: Generation, text: dict[str, Any], ids: list[int], where: str
    ) -> tuple[list[int], dict[str, Any]]:
        """The prompt's ids, the policy's own if known; and what the tokenizer makes of the row's text beside them."""
        try:
            own = tokenize_row(text, self.tokenizer, where)
        except TemplateLimit:
            raise
        except DataError as error:
            if generation.prompt_ids is None:
                raise Reject(str(error).removeprefix(f"{where}: ")) from None
            why = "the tokenizer cannot encode the row"
            return generation.prompt_ids, {name: checks.answer(None, why) for name in _OF_IDS[1:]}
        spelled_by_ids = [LEFT_OUT + key for key in ("content", *REASONING)]
        self._notes = tuple(note for note in own.notes if note not in (*spelled_by_ids, EOS, REWRITTEN))
        prompt = _prompt_ids(text, own, self.tokenizer)
        completion = own.input_ids[len(prompt) :] if own.input_ids[: len(prompt)] == prompt else []
        same = _re_encodes(completion, ids, pieces_of(self.tokenizer).added)
        asked = {"completion re-encodes to the ids": checks.answer(same)}
        given, count = generation.prompt_ids, generation.prompt_count
        if given is not None and given != prompt:
            check_prompt_ids(given, prompt, text["prompt"], tokenizer=self.tokenizer)
        asked["prompt re-encodes to the ids"] = (
            checks.answer(None, "the source gives no ids of the prompt")
            if given is None
            else checks.answer(given == prompt)
        )
        if given is None:
            made = (
                checks.answer(None, "the source tells no count")
                if count is None
                else checks.answer(count == len(prompt))
            )
            asked["prompt tokens as the server counted"] = made
        return prompt if given is None else given, asked

    def _scored_row(
        self, generation: Generation, text: dict[str, Any], where: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A given text that was scored: exactly what `pear score` would have written."""
        if self.tokenizer is None:
            raise Reject("log-probs of prompt and completion in one list: give --tokenizer, to tell them apart")
        own = self._tokenized(text, where)
        tokens = generation.tokens
        if len(tokens) < len(own.input_ids):
            raise Reject(f"{len(tokens)} log-probs for the {len(own.input_ids)} tokens of the row", again=True)
        tokens = tokens[: len(own.input_ids)]  # behind them stands what had to be generated
        given = [token.id for token in tokens]
        if None not in given and given != own.input_ids:
            at = next(t for t, pair in enumerate(zip(given, own.input_ids, strict=True)) if pair[0] != pair[1])
            raise Reject(
                f"the server scored other tokens than --tokenizer makes: at position {at} token {given[at]}, not "
                f"{own.input_ids[at]}"
            )
        _check_spelled(tokens, own.input_ids, self.tokenizer)
        generation.tokens = [token for token, bit in zip(tokens, own.completion_mask, strict=True) if bit]
        asked = {name: checks.answer(True if None not in given else None, _NO_IDS) for name in _OF_IDS}
        return self._own_row(generation, text, own, asked)

    def _encoded_row(
        self, generation: Generation, text: dict[str, Any], where: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Log-probs alone, of a completion that the tokenizer cuts into as many tokens (but for those that end it)."""
        own = self._tokenized(text, where)
        start, count = own.completion_mask.index(1), len(generation.tokens)
        length = len(own.input_ids) - start
        try:
            ends = [number for number, (b, e) in enumerate(spans_of(text, own, self.tokenizer).extents, 1) if e > b]
            least = max(ends, default=0)
        except Unaligned:
            least = length
        if not least <= count <= length:
            raise Reject(
                f"{count} log-probs for {length} tokens ({least} without those that end the turn), as --tokenizer cuts "
                "the completion"
            )
        end = start + count
        own = own._replace(input_ids=own.input_ids[:end], completion_mask=own.completion_mask[:end])
        asked = {name: checks.answer(None, _NO_IDS) for name in _OF_IDS}
        return self._own_row(generation, text, own, asked)

    def _tokenized(self, text: dict[str, Any], where: str) -> TokenizedRow:
        try:
            return tokenize_row(text, self.tokenizer, where)
        except TemplateLimit:
            raise
        except DataError as error:
            raise Reject(str(error).removeprefix(f"{where}: ")) from None

    def _own_row(
        self, generation: Generation, text: dict[str, Any], own: TokenizedRow, asked: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        values = checks.check_logprobs(generation)
        self._notes, left = own.notes, iter(values)
        try:
            spans: Spans | None = spans_of(text, own, self.tokenizer)
            written = spans.to_json()
        except Unaligned as error:
            spans, written = None, {"problem": str(error)}
        asked[_SPANS] = checks.answer(spans is not None)
        row = {
            "input_ids": own.input_ids,
            "completion_mask": own.completion_mask,
            "behavior_logprobs": [next(left) if bit else 0.0 for bit in own.completion_mask],
            "tokenizer": self.fingerprint,
            "behavior_spans": written,
        }
        return row, self._counts(generation, "token", values, len(values), spans, asked)

    def _counts(
        self,
        generation: Generation,
        kind: str,
        values: list[float],
        kept: int,
        spans: Spans | None,
        asked: dict[str, Any],
    ) -> dict[str, Any]:
        known = type(generation.total) in (int, float)
        asked["sum is the cumulative log-prob"] = checks.answer(True if known else None, "the source tells no total")
        told = [value for value in values[:kept] if value > checks.FLOOR]
        counts: dict[str, Any] = {
            "kinds": {kind: 1},
            "tokens": kept,
            "logprob": sum(told),
            "without a value": kept - len(told),
            "checks": asked,
            "grid": checks.grid(told),
            "marks": {} if spans is None else _special(spans),
        }
        if len(values) > kept:
            counts["behind a stop string"] = len(values) - kept
        return counts


# Keys that an import makes; a row that has them already is given them anew.
_MADE = {
    "input_ids", "completion_mask", "behavior_logprobs", "behavior_spans", "behavior_policy", "behavior_estimated",
    "behavior_sampling", "tokenizer", "model", "scored", "prompt", "completion",
}  # fmt: skip
# Keys about single tokens that a row may have from an earlier `pear score`: none of them is of any other tokens.
_OF_TOKENS = {key for key in SEALED if key.startswith(("ref_", "top_k_"))}
_SPANS = "every row's spans"
_OF_IDS = ("ids are the text", "completion re-encodes to the ids", "prompt re-encodes to the ids")


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where the chat template loops. It is found here, in the main thread: others have no alarm (`bounded`)."""
    try:
        Renderer({}, tokenizer, "--tokenizer").text([{"role": "user", "content": "a"}])
    except TemplateLimit:
        raise
    except DataError:  # a template that wants other messages
        pass


def _prompt_ids(text: dict[str, Any], own: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's ids by themselves, as a server has them that does not know the completion yet."""
    prompt = text["prompt"]
    if not own.prompt_cut and prompt:
        return own.input_ids[: own.completion_mask.index(1)]
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    chat = Renderer(text, tokenizer)
    return chat.ids(chat.text(prompt, add_generation_prompt=True))


def _re_encodes(own: list[int], ids: list[int], added: Any) -> bool:
    """Whether the tokenizer cuts a completion as the policy did; it may add an end of turn that the policy did not."""
    rest = own[len(ids) :]
    return own[: len(ids)] == ids and (not rest or rest[0] in added or bool(ids) and ids[-1] in added)


def _check_spelled(tokens: list[Token], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a Reject where a server names a plain word and the id beside it is another; pieces and spaces may differ.

    A start token that it puts in front shifts all log-probs by one, and nothing else shows it.
    """
    pieces = pieces_of(tokenizer)
    for at, (token, own) in enumerate(zip(tokens, map(pieces.surface, ids), strict=True)):
        words = [data.strip() for data in (token.data or b"", own)]
        if all(map(bytes.isalnum, words)) and words[0] != words[1]:
            raise Reject(
                f"the server scored other tokens than --tokenizer makes: at position {at} {words[0].decode()!r}, not "
                f"{words[1].decode()!r}"
            )


def _special(spans: Spans) -> dict[str, int]:
    """How often each structural token stands among the marks."""
    return dict(Counter(mark for mark in spans.marks.values() if not mark.startswith((NO_BYTES, JOINT))))
