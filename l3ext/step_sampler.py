"""Steps of a model, drawn from a corpus: which distinct tokens they hold.

>>> sampler = StepSampler([StepShape("decode", 8), StepShape("prefill", 512)], steps=100, seed=0)
>>> for chunk in chunks:
...     sampler.add(chunk.tokens)
>>> sample = sampler.samples()[StepShape("decode", 8)]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from l3ext._checks import all_of, check_kind, integer

StepKind = Literal["decode", "prefill"]
_MOST_TOKENS = 1 << 28  # of all steps together: 2 GiB


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The tokens of one step of a model.

    Attributes:
        kind: "decode": as many sequences, one token of each, so places anywhere in the corpus;
            "prefill": consecutive tokens, as prompts and training batches are.
        tokens: how many, at least 1.
    """

    kind: StepKind
    tokens: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(StepKind):
            raise ValueError(f'kind: expected "decode" or "prefill", got {self.kind!r}')
        if integer(self.tokens, "tokens") < 1:
            raise ValueError(f"tokens: expected at least 1 a step, got {self.tokens}")

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens}"


@dataclasses.dataclass(frozen=True)
class StepSample:
    """The distinct tokens of some steps: step s has ids[offsets[s]:offsets[s+1]], at least one."""

    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of_steps(cls, tokens: npt.NDArray[Any]) -> StepSample:
        """The sample of steps tokens[s], integers [steps, tokens of a step]."""
        ordered = np.sort(tokens, axis=1).astype(np.int64)
        first = np.ones(ordered.shape, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        return cls(ordered[first], np.concatenate([[0], np.cumsum(first.sum(axis=1))]))

    def rows(self, rows_of_token: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows that each step moves, int64 [steps], where a token moves rows_of_token[id]."""
        return np.add.reduceat(rows_of_token[self.ids], self.offsets[:-1])


class StepSampler:
    """Draws steps from a corpus that passes by once, uniformly over its places.

    Each step is a reservoir of its own, so steps are drawn with replacement. The same chunks in
    the same order and the same seed give the same steps.
    """

    def __init__(self, shapes: Sequence[StepShape], *, steps: int = 1000, seed: int = 0) -> None:
        """Args:
        shapes: the kinds of step, at least one.
        steps: how many of each shape, at least 1.
        seed: of the draw.
        """
        shapes = all_of(shapes, StepShape, "shapes")
        if not shapes:
            raise ValueError("shapes: expected at least one kind of step, got none")
        if integer(steps, "steps") < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        self.shapes = tuple(shapes)
        sizes = {kind: [s.tokens for s in shapes if s.kind == kind] for kind in get_args(StepKind)}
        self._random = np.random.default_rng(integer(seed, "seed", 0))
        drawn = steps * sum(max(tokens, default=0) for tokens in sizes.values())
        if drawn > _MOST_TOKENS:
            raise ValueError(
                f"steps: expected at most {_MOST_TOKENS} tokens in all of them, got {drawn}"
            )
        # A shorter step is the beginning of the longest.
        self._decode = _Reservoir(steps * max(sizes["decode"], default=0), 1)
        self._prefill = _Reservoir(steps if sizes["prefill"] else 0, max(sizes["prefill"] or [1]))
        self._steps = steps

    def add(self, tokens: npt.NDArray[Any]) -> None:
        """Let the next tokens of the corpus pass: integers [n]."""
        check_kind(tokens, np.ndarray, "tokens")
        self._decode.add(tokens, self._random)
        self._prefill.add(tokens, self._random)

    def samples(self) -> dict[StepShape, StepSample]:
        """The steps drawn so far, by shape.

        Raises:
            ValueError: the corpus is shorter than the longest step.
        """
        drawn = {
            "decode": self._decode.windows().reshape(self._steps, -1),
            "prefill": self._prefill.windows(),
        }
        return {
            shape: StepSample.of_steps(drawn[shape.kind][:, : shape.tokens])
            for shape in self.shapes
        }


class _Reservoir:
    """Windows of ``length`` consecutive tokens, each uniform over all places of the stream."""

    def __init__(self, count: int, length: int) -> None:
        self._windows = np.zeros((count, length), np.int64)
        self._places = 0  # at which a window could have begun so far
        self._tail = np.empty(0, np.int64)  # in front of the next tokens: windows cross chunks

    def add(self, tokens: npt.NDArray[Any], random: np.random.Generator) -> None:
        count, length = self._windows.shape
        stream = np.concatenate([self._tail, tokens]) if self._tail.size else tokens
        places = stream.size - length + 1
        if count > 0 and places > 0:
            self._places += places
            replaced = np.flatnonzero(random.random(count) * self._places < places)
            begins = random.integers(0, places, replaced.size)
            self._windows[replaced] = stream[begins[:, None] + np.arange(length)]
        self._tail = np.array(stream[max(0, places) :], np.int64)

    def windows(self) -> npt.NDArray[np.int64]:
        count, length = self._windows.shape
        if count > 0 and self._places == 0:
            raise ValueError(
                f"shapes: expected a corpus of at least {length} tokens, got {self._tail.size}"
            )
        return self._windows
