"""Completions sampled by an engine: a server (vLLM) of the policy's weights. Token ids go there and come back.

What is stored of a token is the log-probability that the engine drew it with. Importance ratios correct for the
distribution that tokens were really drawn from, so `learn` weighs the engine's other rounding as it weighs a policy
that has moved on since. The same tokens go through the weights in this process too. How far the two are apart, the
mismatch, tells whether the engine has these weights; it is filed with the rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, PreTrainedModel

from ketchup_cache.config.servers import EngineOptions
from ketchup_cache.errors import MismatchError, ModelError, ServerError
from ketchup_cache.models.forward import Batch, completion_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import evaluating, is_encoder_decoder, model_name
from ketchup_cache.models.server import ENTRY_BYTES, ROUNDING, Server
from ketchup_cache.parallel.group import by_first, group
from ketchup_cache.provenance import Mismatch, Sampling
from ketchup_cache.rollouts.sample import check_prompts, eos_ids, warpers
from ketchup_cache.types import TOKEN_DTYPE, Places, Ragged, Rollouts, concatenated

FIRST = 8
"""Completions of which the mismatch is looked at before others are asked for."""
STATES_AT_ONCE = 1024
MOVED, SURE = 1e-4, 4
"""Nats (root mean square) that log-probabilities have to move, and standard errors, for a word on where they are."""
MOST = 5.0
"""Nats: of a larger difference, as of a token that only here is just outside of top-p, so many count."""
NEVER = -100
"""Added to the logits of ids that the tokenizer does not have."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts, and of those of an engine the mismatch of each token, [N] float32 nats: the engine's log-probability
    less the one here."""

    rollouts: Rollouts
    apart: NDArray[np.float32] | None = None

    def take(self, rows: Places) -> Drawn:
        places, _ = self.rollouts.completions.places(rows)
        return Drawn(self.rollouts.take(rows), None if self.apart is None else self.apart[places])


class Engine:
    """The server that `options` name, beside the model whose weights it should have."""

    def __init__(self, options: EngineOptions, model: PreTrainedModel, vocab_size: int) -> None:
        """vocab_size: the tokenizer's; other ids are never drawn.

        Raises ModelError for a server that does not have this name, and where logits can't be reproduced (`Head.of`);
        ServerError where it can't be reached.
        """
        self._model, self._eos, self._sampling = model, eos_ids(model), Sampling()
        self._head, self._options = Head.of(model, vocab_size), options
        self._server = Server("student", options)
        self._longest, self._met = self._server.meet(), False
        self._kept: tuple[Ragged, Rollouts, NDArray[np.float32]] | None = None
        """Some rows, and their log-probabilities by the weights that the engine last had."""

    def _asking(self) -> dict[str, Any]:
        """A request, without the prompt and the seed: all that a server may have a default of its own for."""
        sampling, padding = self._sampling, range(self._head.vocab_size, self._head.projection.weight.shape[0])
        return {
            "max_tokens": sampling.max_new_tokens, "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_k": sampling.top_k or -1, "top_p": sampling.top_p, "min_p": 0.0, "n": 1, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "stop": [],
            "stop_token_ids": self._eos, "ignore_eos": True, "logprobs": 1, "return_token_ids": True,
        } | ({"logit_bias": {str(i): NEVER for i in padding}} if padding else {})  # fmt: skip

    def sample(self, prompts: Ragged, sampling: Sampling, first_prompt: int, on_batch: Callable[[int], None]) -> Drawn:
        """As `sample_completions`. Each row has a seed of its own, of the sampling's seed, its prompt's place and its
        number among the samples; whether the same seed draws the same tokens beside other rows is up to the server.

        Raises MismatchError for rows that are longer than the server takes, before anything is sent, and what
        `check_prompts` raises. ServerError, with the prompts that are done (`places`, `done`), where the server fails
        for longer than `retry_for` seconds, answers what can't be, or is further off than `max_mismatch`.
        """
        self._sampling, how, samples = sampling, sampling, sampling.samples
        check_prompts(self._model, self._head.vocab_size, prompts, first_prompt, how)
        if self._longest and (longest := int(prompts.lengths.max(initial=0)) + how.max_new_tokens) >= self._longest:
            # a row of all of them is read again in `_readings`, which asks for one more
            what = f"the longest prompt and --max-new-tokens are {longest:,} tokens, and {self._server.url} takes"
            raise MismatchError(f"{what} {self._longest - 1:,}: start it with --max-model-len {longest + 1}")

        asking = self._asking()

        def one(row: int, stop: Any) -> tuple[list[int], list[float]]:
            place, sample = divmod(row, samples)
            ids = prompts[place].tolist()
            body = asking | {"prompt": ids, "seed": row_seed(how.seed, first_prompt + place, sample)}
            size = ENTRY_BYTES * (len(ids) + 3 * how.max_new_tokens + 4)
            return self._server.complete(body, size, lambda choice: self._read(choice, ids), stop)

        rows, failed, parts = np.arange(len(prompts) * samples), None, list[Drawn]()
        mine = group().cut(rows, prompts.lengths[rows // samples] + how.max_new_tokens)
        first = 0 if self._met else FIRST
        for some in filter(len, (mine[:first], mine[first:])):
            if not failed:
                done, failed = self._server.each(some.tolist(), one, lambda _: on_batch(1))
                drawn = self._compared(prompts, some[[*done]] // samples, done.values())
                far = self._too_far(drawn)
                parts, failed = [*parts, *([] if far else [drawn])], failed or far
        # all processes go on, or end, together
        gathered = group().gathered((parts, failed))
        whole = concatenated([self._compared(prompts, rows[:0], ()), *(part for some, _ in gathered for part in some)])
        if not self._met and len(whole.rollouts):
            kept = whole.rollouts.rows(0, min(FIRST, len(whole.rollouts)))
            self._met, self._kept = True, (prompts, kept, self._own(prompts, kept, []))
        if error := next((error for _, error in gathered if error), None):
            index = whole.rollouts.prompt_index
            complete = np.bincount(index, minlength=len(prompts)) == samples
            error.places, error.done = np.flatnonzero(complete), whole.take(np.flatnonzero(complete[index]))
            raise error
        return whole

    def update(self, folder: Path) -> None:
        """Have the engine take the weights of a folder that it can read: those that the model here has now.

        Raises ModelError where it can't, ServerError where it answers as with the weights that it had before.
        """
        by_first(self._hand_over)(folder)
        self._met = False

    def _hand_over(self, folder: Path) -> None:
        root = self._server.url.removesuffix("/v1")
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        before = self._readings()
        try:
            self._server.send(f"{root}/collective_rpc", asked, once=True)
            emptied = self._server.send(f"{root}/reset_prefix_cache", {}, once=True)
        except ServerError as error:
            todo = f"start a vLLM with VLLM_SERVER_DEV_MODE=1, where it can read {folder}"
            raise ModelError(f"the engine takes no new weights ({error}): {todo}") from None
        if emptied != {"success": True}:
            raise ServerError(f"{root}/reset_prefix_cache: {self._server.clean(emptied)}; leave it to this run alone")
        self._require_arrived(before)

    def _readings(self) -> NDArray[np.float64]:
        """The engine's log-probabilities of the tokens of the rows that were kept."""
        if not self._kept:
            return np.zeros(0)
        prompts, rollouts, _ = self._kept

        def asked(row: int, stop: Any) -> list[float]:
            prompt, tokens = prompts[rollouts.prompt_index[row]].tolist(), rollouts.completions[row].tolist()
            body = {"prompt": (ids := prompt + tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}

            def read(choice: dict[str, Any]) -> list[float]:
                places = list(zip(choice["prompt_logprobs"], ids, strict=True))[len(prompt) :]
                return [float(at[str(i)]["logprob"]) for at, i in places]

            return self._server.complete(body, 3 * ENTRY_BYTES * (len(ids) + 2), read, stop)

        done, failed = self._server.each(range(len(rollouts)), asked, len)
        if failed:
            raise failed
        return np.concatenate([*done.values()])

    def _require_arrived(self, before: NDArray[np.float64]) -> None:
        """Raises ServerError where the engine's log-probabilities of the rows that were kept have not gone, from these,
        where those of the weights here went. Where they had to go less far than it rounds, that can't be told."""
        if not self._kept:
            return
        prompts, rollouts, old = self._kept
        moved, seen = self._own(prompts, rollouts, []).astype(np.float64) - old, self._readings() - before
        if (size := float(moved @ moved)) < len(moved) * MOVED**2:
            return
        share = float(seen @ moved) / size
        error = float(np.sqrt(np.mean((seen - share * moved) ** 2) / size))
        if share + SURE * error < 0.5:
            what = "answers as with the weights that it had before, not as with those that it was given"
            raise ServerError(f"{self._server.url}: {what}; see its log, then run this again to go on")

    def _read(self, choice: dict[str, Any], prompt: list[int]) -> tuple[list[int], list[float]]:
        """Token ids and log-probabilities of a completion. Raises ValueError where it can't be."""
        tokens, logprob = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        longest = self._sampling.max_new_tokens
        if choice["prompt_token_ids"] != prompt or not all(type(i) is int for i in tokens):
            raise ValueError("no token ids")
        if not 0 < len(tokens) == len(logprob) <= longest:
            raise ValueError(f"{len(logprob)} log-probabilities of {len(tokens)} tokens, {longest} at most")
        if not 0 <= min(tokens) <= max(tokens) < self._head.vocab_size:
            raise ValueError(f"an id that the tokenizer does not have, of {self._head.vocab_size:,}")
        given = np.array(logprob, np.float64)
        if not (np.isfinite(given).all() and given.max() <= ROUNDING):
            raise ValueError("a log-probability is NaN, infinite or above 0")
        ends = [place for place, i in enumerate(tokens, 1) if i in self._eos]
        if ends and ends[0] < len(tokens):
            raise ValueError(f"it goes on after token {ends[0]}, which ends it")
        if not ends and len(tokens) < longest:
            raise ValueError(
                f"it ends after {len(tokens)} tokens by itself: start a vLLM with --generation-config vllm"
            )
        return tokens, logprob

    def _compared(self, prompts: Ragged, index: NDArray[np.int64], rows: Any) -> Drawn:
        """What came of some rows, beside what the model here makes of it. index: the prompt of each."""
        tokens, given = zip(*rows, strict=True) if len(index) else ((), ())
        completions, logprob = Ragged.from_rows(tokens, TOKEN_DTYPE), Ragged.from_rows(given, np.float32).values
        finished = np.array([row[-1] in self._eos for row in tokens], np.bool_)
        behavior = np.zeros_like(logprob) if self._sampling.greedy else np.minimum(logprob, 0)
        rollouts = Rollouts(index, completions, behavior, np.zeros(len(logprob), np.bool_), finished)
        return Drawn(rollouts, logprob - self._own(prompts, rollouts, warpers(self._sampling)))

    @torch.no_grad()
    def _own(self, prompts: Ragged, rollouts: Rollouts, change: list[LogitsProcessor]) -> NDArray[np.float32]:
        """Log-probability of every token by the weights here, [N]. change: of the policy's distribution, to the one
        that the engine draws from."""
        batch = Batch(prompts, rollouts.prompt_index, rollouts.completions)
        found, size = np.zeros(len(rollouts.completions.values), np.float32), self._options.rollout_batch

        def chosen(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = self._head.logits(states)
            for warper in change:
                logits = warper(targets, logits)
            return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]

        alike = np.argsort(prompts.lengths[rollouts.prompt_index], kind="stable")
        with evaluating(self._model):
            for rows in (alike[start : start + size] for start in range(0, len(alike), size)):
                part = batch.take(rows)
                targets = torch.tensor(part.completions.values, dtype=torch.long, device=self._head.device)
                states = completion_states(self._model, part)
                pieces = zip(states.split(STATES_AT_ONCE), targets.split(STATES_AT_ONCE), strict=True)
                places, _ = rollouts.completions.places(rows)
                found[places] = torch.cat([chosen(*piece) for piece in pieces]).cpu().numpy()
        return found

    def _too_far(self, drawn: Drawn) -> ServerError | None:
        mismatch, limit = self.mismatch(drawn), self._options.max_mismatch
        if mismatch is None or mismatch.mean <= limit:
            return None
        how = self._sampling
        plain = how.greedy or (how.temperature, how.top_k, how.top_p) == (1, 0, 1)
        todo = "" if plain else ", and start it with --logprobs-mode processed_logprobs"
        what = f"{self._server.url}: its log-probabilities of tokens that it drew differ by {mismatch.mean:.2g} nats"
        what += f" (mean) from those of {model_name(self._model)} here, more than --max-mismatch {limit:g}"
        return ServerError(f"{what}: serve these weights as {self._server.name}{todo}")

    def mismatch(self, drawn: Drawn) -> Mismatch | None:
        """None where there are no tokens."""
        if drawn.apart is None or not len(drawn.apart):
            return None
        apart = np.nan_to_num(np.abs(drawn.apart.astype(np.float64)), nan=MOST).clip(max=MOST)
        figures = {"mean": apart.mean(), "largest": apart.max(), "far": (apart > math.log(2)).mean()}
        return Mismatch(engine=self._server.name, **{name: float(f"{x:.3g}") for name, x in figures.items()})


def require_decoder(options: EngineOptions, student: str, *, trust_remote_code: bool) -> None:
    """Raises ModelError for rollouts by an engine of an encoder-decoder."""
    if options.student_url and is_encoder_decoder(student, trust_remote_code=trust_remote_code):
        raise ModelError(f"{student}: is an encoder-decoder, which vLLM does not serve; leave --student-url out")


def row_seed(seed: int, place: int, sample: int) -> int:
    """Of a sample of the prompt in this place of the data: 63 bits."""
    return int(np.random.SeedSequence([seed, place, sample]).generate_state(1, np.uint64)[0] >> np.uint64(1))
