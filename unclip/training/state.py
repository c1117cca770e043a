"""State of a training, as saved in checkpoints: weights, EMA weights and the optimiser."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from unclip.training import parallel
from unclip.training.objective import Tensors
from unclip.training.precision import LossScale
from unclip.training.settings import TrainerConfig, learning_rate


class TrainingState:
    """Weights, EMA weights and optimiser state by parameter name, and the tensors of the objective."""

    def __init__(
        self,
        model: nn.Module,
        objective: Mapping[str, Tensor],
        config: TrainerConfig,
        learning_rate_factors: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Args: learning_rate_factors: see `objective.Paced`."""
        self.model, self.objective, self.config = model, objective, config
        self.loss_scale = LossScale.of(config.precision)
        self.num_nonfinite = self.num_roll_backs = 0
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for module in learning_rate_factors:
            assert any(name.startswith(f"{module}.") for name in self.parameters), (
                f"there are no parameters of {module}"
            )
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, value in self.parameters.items():
            factor = next(
                (each for module, each in learning_rate_factors.items() if name.startswith(f"{module}.")), 1.0
            )
            groups.setdefault((factor, value.dim() >= 2), []).append(value)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": values, "weight_decay": config.weight_decay if is_matrix else 0.0, "factor": factor}
                for (factor, is_matrix), values in groups.items()
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )
        # Created before the first step, so that a checkpoint can be copied into them.
        for value in self.parameters.values():
            moments = {name: torch.zeros_like(value.detach()) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device=value.device)
            self.optimizer.state[value] = {"step": step, **moments}
        self.ema_weights = {name: value.detach().clone() for name, value in self.parameters.items()}

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients over all ranks; undoes the loss scale."""
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        if self.loss_scale.enabled:
            torch._foreach_mul_([parallel.local_shard(gradient) for gradient in gradients], 1 / self.loss_scale.value)
        return parallel.full_tensor(torch.nn.utils.get_total_norm(gradients)).float()

    def apply(self, samples_seen: int, gradient_norm: float) -> None:
        """Clip the gradients, whose norm is `gradient_norm`, and take an optimiser step."""
        if gradient_norm > self.config.clip_norm:
            norm = torch.tensor(gradient_norm)
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.config, samples_seen)
        self.optimizer.step()
        self.zero_grad()
        self.loss_scale.grow()
        steps = samples_seen / self.config.batch_size
        decay = min(self.config.ema_decay, (1 + steps) / (10 + steps))
        with torch.no_grad():
            ema_weights = [parallel.local_shard(value) for value in self.ema_weights.values()]
            weights = [parallel.local_shard(value.detach()) for value in self.parameters.values()]
            torch._foreach_lerp_(ema_weights, weights, 1 - decay)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> Tensors:
        """All tensors that later steps depend on; checkpoints are restored into them."""
        groups: dict[str, Mapping[str, Tensor]] = {"weights": self.model.state_dict(), "average": self.ema_weights}
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            groups[moment] = {name: self.optimizer.state[value][moment] for name, value in self.parameters.items()}
        groups["objective"] = self.objective
        return {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}

    def facts(self) -> dict[str, Any]:
        """State besides the tensors that later steps depend on."""
        return {
            "num_nonfinite": self.num_nonfinite,
            "num_roll_backs": self.num_roll_backs,
            "loss_scale": dataclasses.asdict(self.loss_scale),
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Restore what `facts` returned."""
        self.num_nonfinite, self.num_roll_backs = facts.get("num_nonfinite", 0), facts.get("num_roll_backs", 0)
        if "loss_scale" in facts:
            self.loss_scale = LossScale(**facts["loss_scale"])

    def ema_state_dict(self) -> Tensors:
        """Full state dict of the model on the CPU, with EMA weights. All ranks must call it."""
        values = {**self.model.state_dict(), **self.ema_weights}
        return {name: parallel.full_tensor(value).cpu() for name, value in values.items()}
