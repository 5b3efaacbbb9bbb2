"""A small regression trained through all of common/train: the tests of this folder start, stop and kill it."""

import argparse
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from heirloom.common.errors import InputError, Stopped
from heirloom.common.mesh import MeshConfig, batch_sharding, start
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.train import loop
from heirloom.common.train.agreement import agree, one_place
from heirloom.common.train.loop import Cadence, Run
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.state import State, abstract_state, create_state
from heirloom.common.train.step import StepConfig, make_step

SPEC = {
    "up/kernel": Leaf(Axes.parse("embed -> hidden"), (128, 512), np.dtype("float32")),  # large enough to be split
    "up/bias": Leaf(Axes.parse("hidden"), (512,), np.dtype("float32")),
    "down/kernel": Leaf(Axes.parse("hidden -> embed"), (512, 4), np.dtype("float32")),
}
STEP = StepConfig(ema=0.9, accumulate=2)
ROWS = 16


class Rows:
    """Batch n is a function of n. Batch `stall` never comes; batch `term` asks this process to stop."""

    def __init__(self, mesh, stall, term):
        self.next, self.sharding, self.stall, self.term = 0, batch_sharding(mesh), stall, term

    def __next__(self):
        if self.next == self.stall:
            print("stalled", flush=True)
            sys.stdin.read()
        if self.next == self.term:
            os.kill(os.getpid(), signal.SIGTERM)
        rng = np.random.default_rng(self.next)
        self.next += 1
        x = rng.normal(size=(ROWS, 128)).astype("float32")
        batch = {"x": x, "y": x[:, :4] * x[:, 4:8]}
        return {
            name: jax.make_array_from_callback(rows.shape, self.sharding, lambda i, rows=rows: rows[i])
            for name, rows in batch.items()
        }

    def state(self):
        return {"next": self.next}

    def restore(self, state):
        self.next = state["next"]


def loss(params, batch, key, frozen):
    x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
    guess = jax.nn.relu(x @ params["up/kernel"] + params["up/bias"]) @ params["down/kernel"]
    error = (guess - batch["y"]) ** 2
    return error.mean(), {"error": (error.sum(), error.size)}


def initial_params():
    rng = np.random.default_rng(0)
    return {path: rng.normal(0, 0.05, leaf.shape).astype("float32") for path, leaf in SPEC.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--mesh", type=int, nargs=3, default=(2, 2, 2))
    parser.add_argument("--total", type=int, default=60)
    parser.add_argument("--stall", type=int, default=-1)
    parser.add_argument("--term", type=int, default=-1)
    parser.add_argument("--lr", type=float, help="a fact that all processes must agree on; nothing is trained")
    parser.add_argument("--apart", action="store_true", help="each process has a folder of its own in the run")
    parser.add_argument("--copy", type=Path, help="only read the last state here, and write it there")
    args = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    mesh = start(MeshConfig(*args.mesh), patience=60)
    if args.lr is not None:
        try:
            agree({"config": {"optim": {"lr": args.lr}, "steps": 3}})
            one_place(args.run, patience=1)
        except InputError as error:
            sys.exit(str(error))
        return
    if args.apart:
        loop.apart = lambda: True
        args.run /= str(jax.process_index())
    run = Run.open(args.run, {})
    optimizer = make_optimizer(OptimConfig(lr=1e-3, warmup=5, schedule="constant"), SPEC, 1000)
    like = abstract_state(optimizer, SPEC, mesh, STEP.ema)
    state = run.restore_or(lambda: create_state(initial_params(), optimizer, SPEC, mesh, STEP.ema), like)
    if args.copy:
        copy = Run.open(args.copy, {})
        copy.checkpoints.save(int(state.step), state, run.resumed)
        return copy.checkpoints.wait()

    def write(state: State) -> None:
        run.model.mkdir(exist_ok=True)
        trees = {"params": state.params, "ema": state.ema}
        np.savez(
            run.model / "state.npz", **{f"{name}/{path}": x for name, tree in trees.items() for path, x in tree.items()}
        )

    step = make_step(loss, optimizer, SPEC, mesh, STEP)
    data = Rows(mesh, args.stall, args.term)
    on_finish = write if jax.process_count() == 1 else None
    try:
        run.fit(
            state, step, data, args.total, examples_per_step=ROWS, cadence=Cadence(log=5, save=8), on_finish=on_finish
        )
    except Stopped as stopped:  # as the command does
        print(stopped)
        sys.exit(75)


if __name__ == "__main__":
    main()
