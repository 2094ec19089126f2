"""What a config means on this machine: its step programs and the layout of its state."""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from efae_jax import data, disentanglement, validation
from efae_jax.compilation import count_cache_hits
from efae_jax.errors import UserError
from efae_jax.methods import make_method
from efae_jax.methods.base import Method
from efae_jax.optim import make_optimizer
from efae_jax.sharding import batch_sharding, make_mesh, replicated, tree_shardings
from efae_jax.state import init_state, make_train_step
from efae_jax.warm_start import read_autoencoder

# What measures a method's product, by `config.model.kind`; an autoencoder unless listed. Each
# module has check_evaluation, Evaluator and evaluate_workdir.
JUDGES = {"disentangler": disentanglement}


class Run:
    """What a config means on this machine: method, mesh, step programs, layout of the state.

    Building one compiles nothing and allocates nothing on the devices, but traces the
    training steps and one evaluation step abstractly, so that whatever does not fit in
    the config ends here.

    Args:
      config: as `configs/` make them.
      devices: all of them unless told otherwise.

    Attributes:
      programs: the compiled step for every plan of the method that has come up.
      compile_seconds: spent on compiling them, or on reading them back.
      cache_hits: how many of them were read back from JAX's persistent compilation cache.

    Raises:
      UserError: one line that says what does not fit and what is allowed.
    """

    def __init__(self, config: Any, devices: Any = None):
        self.config = config
        self.mesh: Mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        self._check_numbers()
        try:
            self.method: Method = make_method(config)
            first, *others = self.method.players
            settings = {first: config.optim} | {p: config[f"optim_{p}"] for p in others}
            self.optimizers = {
                player: make_optimizer(settings[player], config.train.steps)
                for player in self.method.players
            }
            step = make_train_step(
                self.method,
                self.optimizers,
                seed=config.seed,
                ema_decay=config.ema.decay,
                accumulate=config.train.accumulate,
            )
            self._init = lambda key: init_state(self.method, self.optimizers, key)
            shapes = jax.eval_shape(self._init, jax.random.key(0))
            for plan in self.method.plans_to_check():
                traced = functools.partial(step, plan=plan)
                jax.eval_shape(traced, shapes, self.abstract_batch(), self.method.frozen)
            product = shapes["ema"][self.method.players[0]]
            judge(config).check_evaluation(self.method.product, product, config, self.mesh)
        except ValueError as error:  # the mathematics and the models know no UserError
            raise UserError(str(error)) from error
        self.state_shardings = tree_shardings(shapes, config.mesh.rules, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            self.state_shardings,
        )
        self._step = jax.jit(
            step,
            in_shardings=(self.state_shardings, batch_sharding(self.mesh), replicated(self.mesh)),
            out_shardings=(self.state_shardings, replicated(self.mesh)),
            donate_argnums=0,
            static_argnums=3,
        )
        self.programs: dict[Hashable, Any] = {}
        self.compile_seconds, self.cache_hits = 0.0, 0

    def load_pretrained(self) -> dict[str, Any]:
        """Parameters, by player, that a run does not start from scratch with."""
        pretrained = self.method.load_pretrained()
        if self.config.init_from:
            pretrained[self.method.players[0]] = read_autoencoder(
                self.config, self.config.init_from
            )
        return pretrained

    def init(self, pretrained: dict[str, Any] | None = None) -> dict[str, Any]:
        """The state of step 0, every array made where it belongs; pretrained parts replaced.

        Args:
          pretrained: what `load_pretrained` gives; loaded unless given.
        """
        pretrained = self.load_pretrained() if pretrained is None else pretrained
        init = jax.jit(self._init, out_shardings=self.state_shardings)
        state = init(jax.random.key(self.config.seed))
        for player, part in pretrained.items():
            for tree in (state["params"], state["ema"]):
                if player in tree:
                    tree[player] = _replace(tree[player], part)
        return state

    @functools.cached_property
    def frozen(self) -> Any:
        """The weights that nobody trains, on every device."""
        return jax.device_put(self.method.load_frozen(), replicated(self.mesh))

    def step(
        self, state: dict[str, Any], batch: dict[str, jax.Array], plan: Hashable = None
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """One training step by the program of a plan, compiled when the plan first comes up."""
        if plan not in self.programs:
            start = time.monotonic()
            lowered = self._step.lower(state, batch, self.frozen, plan)
            with count_cache_hits() as hits:
                self.programs[plan] = lowered.compile()
            self.cache_hits += min(len(hits), 1)
            self.compile_seconds += time.monotonic() - start
        return self.programs[plan](state, batch, self.frozen)

    def _check_numbers(self) -> None:
        config, train, devices = self.config, self.config.train, self.mesh.size
        data.make_reader(config.data, train=True)
        if config.seed < 0:
            raise UserError(f"config.seed={config.seed} must be at least 0")
        for name, value in (
            ("train.steps", train.steps),
            ("log.every", config.log.every),
            ("checkpoint.every", config.checkpoint.every),
            ("checkpoint.keep", config.checkpoint.keep),
        ):
            if value < 1:
                raise UserError(f"config.{name}={value} must be at least 1")
        parts = devices * train.accumulate
        if train.accumulate < 1 or train.batch_size < 1 or train.batch_size % parts:
            raise UserError(
                f"config.train.batch_size={train.batch_size} must be a positive multiple of "
                f"devices x accumulate = {devices} x {train.accumulate}"
            )

    def lower(self, plan: Hashable = None) -> jax.stages.Lowered:
        """The step of a plan for shapes alone: compiled, it tells what it would take."""
        arguments = (self.abstract_state, self.abstract_batch(), self.method.frozen)
        return self._step.lower(*arguments, plan)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The whole batch's shapes and types."""
        size, one = self.config.train.batch_size, data.make_reader(self.config.data, train=True)
        return {
            name: jax.ShapeDtypeStruct((size, *np.shape(array)), array.dtype)
            for name, array in one.blank().items()
        }


def _replace(tree: Any, part: Any) -> Any:
    """The tree with the leaves of `part` in place of its own, laid out as its own were."""
    if not isinstance(part, dict):
        return jax.device_put(np.asarray(part, tree.dtype), tree.sharding)
    if unknown := part.keys() - tree.keys():
        raise KeyError(f"pretrained parameters that the model lacks: {sorted(unknown)}")
    return {k: _replace(v, part[k]) if k in part else v for k, v in tree.items()}


def judge(config: Any) -> Any:
    """The module that measures what a config trains."""
    return JUDGES.get(config.model.kind, validation)
