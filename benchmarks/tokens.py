"""Transformer over image tokens, DALL·E's, against GPT-2 of transformers: training in samples per second, sampling in images.

    python -m benchmarks.tokens
    python -m benchmarks.tokens --size demo

Both have the same width, depth, heads, sequence and batch, and parameter counts within 5 %. A sequence has the tokens of a
caption, then those of an image; both weigh the text by 1/8. GPT-2 has one vocabulary for both kinds of token, as it has one
embedding and one head. A training step is complete, as in `benchmarks.training`: ours is the trainer's own loop. Sampling draws
all image tokens of a batch of captions with a key-value cache, by `generate` in transformers.

Letters: B batch, L text tokens, N image tokens, K codebook size, V size of the text vocabulary.
"""

import argparse
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, training
from benchmarks.training import WARM_UP_STEPS, Training
from unclip.background import usable_cpus
from unclip.models.dalle import Dalle, DalleConfig
from unclip.models.token_transformer import TokenSampling
from unclip.training.objective import Tensors
from unclip.training.precision import autocast

GOAL = 1.3
"""Speed of the training relative to transformers."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Models of equal size for both contenders."""

    model: DalleConfig
    text_length: int
    """L."""
    batch_size: int
    num_sampled: int
    """Captions sampled together."""


SIZES = {
    # the demo's sequence of 88 tokens
    "demo": Size(DalleConfig(192, 4, 3, text_vocab_size=128, grid_size=8, codebook_size=256), 24, 64, 64),
    # 20 M parameters, 320 tokens
    "small": Size(DalleConfig(384, 8, 6, text_vocab_size=4096, grid_size=16, codebook_size=1024), 64, 8, 16),
}


class TokenLosses:
    """Objective of a `Dalle` on token ids in memory, weighted as in `unclip.systems.tokens`."""

    def __init__(self, model: Dalle) -> None:
        self.model = model
        self.sample_size: dict[str, int] = {}
        self.state: Tensors = {}

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        losses: Tensor = network(tensors["tokens"], tensors["codes"]).float().mean(dim=0)  # [2]
        return (losses * losses.new_tensor(self.model.loss_weights)).sum()

    def metrics(self, training: bool) -> dict[str, float]:
        return {}

    def preview(self, model: nn.Module) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {}


def example_rows(size: Size, batch_size: int) -> Tensors:
    """Captions of different lengths [B, L], without the id 0, which is padding, and image tokens [B, N]."""
    config = size.model
    tokens = torch.randint(1, config.text_vocab_size - 1, (batch_size, size.text_length))
    lengths = torch.randint(size.text_length // 2, size.text_length + 1, (batch_size, 1))
    tokens = tokens * (torch.arange(size.text_length) < lengths)
    return {"tokens": tokens, "codes": torch.randint(config.codebook_size, (batch_size, config.num_image_tokens))}


def new_dalle(size: Size) -> Dalle:
    model = Dalle(size.model, size.text_length)
    model.vocabulary.fit(torch.arange(1, size.model.text_vocab_size)[None])  # all ids
    return model


def new_gpt2(size: Size, dropout: float = 0.0) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    model = size.model
    gpt2: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.text_vocab_size + model.codebook_size,
            n_positions=size.text_length + model.num_image_tokens,
            n_embd=model.width,
            n_layer=model.depth,
            n_head=model.num_heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return gpt2


def our_training(size: Size, arguments: argparse.Namespace) -> Training:
    objective: Any = TokenLosses(new_dalle(size))
    batch_size = arguments.batch_size or size.batch_size
    return training.ours(objective, example_rows(size, batch_size), batch_size, arguments)


def their_training(size: Size, arguments: argparse.Namespace) -> Training:
    from diffusers.training_utils import EMAModel

    model, batch_size = new_gpt2(size), arguments.batch_size or size.batch_size
    rows, first = example_rows(size, batch_size), size.text_length
    sequence = torch.cat([rows["tokens"], rows["codes"] + size.model.text_vocab_size], dim=1)  # [B, L + N]
    ema = EMAModel(model.parameters(), foreach=True)

    def loss() -> Tensor:
        logits = model(sequence[:, :-1]).logits  # [B, L + N - 1, V + K]
        text, image = logits.split([first - 1, size.model.num_image_tokens], dim=1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), target.flatten())
            for part, target in ((text, sequence[:, 1:first]), (image, sequence[:, first:]))
        ]
        return losses[0] / 8 + losses[1] * 7 / 8

    return training.theirs(model, model, loss, lambda: ema.step(model.parameters()), batch_size, arguments)


TRAININGS: dict[str, Callable[[Size, argparse.Namespace], Training]] = {
    "unclip": our_training,
    "transformers": their_training,
}


def serve(name: str, arguments: argparse.Namespace, connection: Connection) -> None:
    """Train one contender, some steps per request; runs in its own process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    contender = TRAININGS[name](SIZES[arguments.size], arguments)
    connection.send(training.describe(contender, arguments))
    with contextlib.suppress(EOFError):  # no more requests
        contender.run(training.turns(contender, arguments, connection))


class Contender(training.Contender):
    """The process that trains one contender."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(name, arguments, other), daemon=True)
        self._process.start()
        other.close()
        self.facts = self._connection.recv()
        self.turn(WARM_UP_STEPS)


def compare_training(arguments: argparse.Namespace) -> None:
    """Measure and print samples per second of both trainings."""
    with contextlib.ExitStack() as stack:
        contenders = {name: stack.enter_context(contextlib.closing(Contender(name, arguments))) for name in TRAININGS}
        speeds = measure.interleave(
            {name: lambda name=name: contenders[name].turn(arguments.steps).samples_per_second for name in TRAININGS},  # type: ignore[misc]
            arguments.rounds,
        )
    print(f"\ntraining, batch {contenders['unclip'].facts.batch_size}, goal {GOAL}")
    for name, of_rounds in speeds.items():
        ratio = measure.median_ratio(speeds["unclip"], of_rounds)
        cost = training.cost(contenders[name].facts, of_rounds)
        print(f"{name:13} {measure.describe(of_rounds):>24} samples/s; unclip is faster by {ratio:.2f}{cost}")


@torch.no_grad()
def compare_sampling(arguments: argparse.Namespace) -> None:
    """Measure and print images per second of both samplers."""
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    tokens = example_rows(size, size.num_sampled)["tokens"]
    dalle, gpt2 = new_dalle(size).eval(), new_gpt2(size).eval()
    settings, count = TokenSampling(num_candidates=1), size.model.num_image_tokens
    device = torch.device("cpu")

    def ours() -> Tensor:
        with autocast("fp32", device):
            return dalle.sample(tokens, settings, generator=torch.Generator().manual_seed(0))

    def theirs() -> Tensor:
        # equal work: all positions attend, and exactly N tokens are drawn from all of the vocabulary
        generated: Tensor = gpt2.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
        return generated[:, size.text_length :]

    def speed(sample: Callable[[], Tensor]) -> float:
        started = time.monotonic()
        assert sample().shape == (size.num_sampled, count)
        return size.num_sampled / (time.monotonic() - started)

    samplers = {"unclip": ours, "transformers": theirs}
    for sample in samplers.values():
        sample()  # warm-up
    speeds = measure.interleave(
        {name: lambda sample=sample: speed(sample) for name, sample in samplers.items()},  # type: ignore[misc]
        arguments.rounds,
    )
    print(f"\nsampling with a key-value cache, fp32, {size.num_sampled} captions, {count} image tokens each")
    for name, of_rounds in speeds.items():
        ratio = measure.median_ratio(speeds["unclip"], of_rounds)
        print(f"{name:13} {measure.describe(of_rounds):>24} images/s; unclip is faster by {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES), help="20 M parameters, or the demo's 2 M")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both contenders")
    parser.add_argument("--steps", type=int, default=10, help="training steps in one round")
    parser.add_argument("--batch-size", type=int, default=0, help="samples per step; 0 uses that of --size")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="where to train")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="precision of trainings")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="CPU threads of each contender")
    arguments = parser.parse_args()
    arguments.compile = arguments.profile = False

    os.environ |= training.MALLOC
    print(measure.machine("torch", "transformers"))
    print(vars(arguments), flush=True)
    compare_training(arguments)
    compare_sampling(arguments)


if __name__ == "__main__":
    main()
