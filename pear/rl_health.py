"""What goes wrong in RL without an error, in words: nothing to learn from, cut completions, a policy that runs away."""

STEPS = 10  # optimiser steps that trouble in the rollouts must last
FAR = 10.0  # nats a token of KL; runs that learn stay below 1
ALL_CLIPPED = 0.99  # share of tokens


class RolloutHealth:
    """Which trouble each generation has had, and since which step."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}
        self._message: dict[str, str] = {}

    def note(self, step: int, found: dict[str, str | None]) -> None:
        """Of the generation that `step` begins with: by kind, what is wrong, or None."""
        for kind, message in found.items():
            if message is None:
                self._since.pop(kind, None)
            else:
                self._since.setdefault(kind, step)
                self._message[kind] = message

    def lasting(self, step: int) -> dict[str, str]:
        """After `step` steps: what has been so for the last STEPS of them."""
        return {
            kind: f"Steps {since + 1} to {step}: {self._message[kind]}"
            for kind, since in self._since.items()
            if step - since >= STEPS
        }


def rollouts_in_words(
    *,
    advantage: float,  # the largest size of any
    reward: float,  # mean; NaN: no completion was judged
    trained: int,  # tokens with a loss
    truncated: float,  # share of completions
    max_completion_length: int,
    beta: float,
    samples: str | None,  # folder
) -> dict[str, str | None]:
    """What is wrong with one generation, by kind; None where it is not."""
    judged = reward == reward
    see = f" Read the completions in {samples}." if samples else ""
    return {
        "advantage": f"every advantage is 0, since all completions of a prompt have the same reward (mean reward "
        f"{reward:.3g}). Nothing trains{' but the KL term' if beta else ''}.{see} Check the reward function on them; "
        "take easier prompts, more num_generations or a higher temperature, or train with `pear sft` first."
        if judged and advantage < 1e-6
        else None,
        "not_judged": f"the reward functions judged no completion (each returned None), so nothing trains.{see} "
        "Check what they read."
        if not judged
        else None,
        "truncated": f"every completion was cut at max_completion_length = {max_completion_length} before it ended."
        f"{see} Raise --max_completion_length, or check that the model ends its answers (its chat template and its "
        "end-of-sequence token); --mask_truncated_completions leaves cut ones out of the loss."
        if truncated >= 1
        else None,
        "masked": "no token has a loss: all are masked, as mask_truncated_completions or a tool mask leaves them. "
        "Nothing trains. Raise --max_completion_length, or leave --mask_truncated_completions out."
        if trained == 0
        else None,
    }


def log_in_words(logs: dict[str, float | None], beta: float) -> dict[str, str]:
    """What is wrong with a run that logs this, by kind."""
    found = {}
    for name, what, more in (
        ("kl", "the reference", "raise beta, "),
        ("pear/kl_old", "the policy that drew the completions", "fewer num_iterations or steps_per_generation, "),
    ):
        value = logs.get(name)
        if value is not None and not value <= FAR:
            found[name] = (
                f"The KL divergence from {what} is {value:.3g} nats a token (`{name}`, above {FAR:g}): the policy runs "
                f"away. Try a lower learning_rate, {more}or go on from an earlier checkpoint."
            )
    share = logs.get("clip_ratio/region_mean")
    if share is not None and share >= ALL_CLIPPED:
        found["clipped"] = (
            f"{share:.1%} of the tokens' ratios are clipped, so the policy's loss has no gradient"
            f"{' but that of the KL term' if beta else ''}. Try a lower learning_rate, fewer num_iterations or "
            "steps_per_generation, or a wider epsilon and epsilon_high."
        )
    return found
