"""Random numbers of a batch whose rows belong to several requests, each with a seed of its own.

A system draws all noise of a batch from one generator, so an image depends on its place in the batch, and on the batch's size.
Here each request draws its own rows, as it does when it is sampled alone. So requests can be sampled together, and each gets the
noise of its own seed, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class UnsplitError(Exception):
    """A draw of a batch whose rows are not those of its requests; each request can be sampled alone."""


class RowGenerators(TorchFunctionMode):
    """Context in which random numbers that are drawn from `generator` come from the generators of the requests.

    Every draw must have rows for all requests, in their order: `count` rows for each, or a multiple. Other draws are untouched.
    A single request draws from its own generator, in any way.

    Raises:
        UnsplitError: a draw of several requests cannot be split by its rows.
    """

    def __init__(self, generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        """Args:
        generators: one for each request, all on one device.
        counts: rows of each request.
        """
        super().__init__()
        self.generator = generators[0] if len(generators) == 1 else torch.Generator(generators[0].device)
        """Generator to hand to a system. That of several requests stands for theirs and is never drawn from."""
        self._requests = list(zip(generators, counts, strict=True))

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(self._requests) == 1 or not kwargs or kwargs.get("generator") is not self.generator:
            return function(*args, **(kwargs or {}))
        num_rows, arguments_of = _rows_of(function, args)
        times, rest = divmod(num_rows, sum(count for _, count in self._requests))
        if rest or not times:
            raise UnsplitError(
                f"{function.__name__} draws {num_rows} rows, which are not those of the requests. Sample them one by one."
            )
        drawn: list[Tensor] = []
        first = 0
        for generator, count in self._requests:
            rows = slice(first, first + count * times)
            drawn.append(function(*arguments_of(rows), **{**kwargs, "generator": generator}))
            first = rows.stop
        return torch.cat(drawn)


def _rows_of(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[int, Callable[[slice], tuple[Any, ...]]]:
    """Rows that a call draws, and the arguments with which it draws some of them."""
    if function in (torch.randn, torch.rand):
        shape = tuple(args) if isinstance(args[0], int) else tuple(args[0])
        return shape[0], lambda rows: ((rows.stop - rows.start, *shape[1:]),)
    if function is torch.randint:
        *bounds, shape = args
        return shape[0], lambda rows: (*bounds, (rows.stop - rows.start, *shape[1:]))
    if function is torch.multinomial and args[0].dim() == 1:
        weights, count, *others = args
        return count, lambda rows: (weights, rows.stop - rows.start, *others)
    if function is torch.multinomial:
        weights, *others = args
        return len(weights), lambda rows: (weights[rows], *others)
    raise UnsplitError(
        f"{function.__name__} draws random numbers in an unknown order of rows. Sample requests one by one."
    )
