"""Processes for the checkpoint tests: with other device counts, killed, on a disk that refuses, or two in one run."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sana_jax.errors import run_command_line
from sana_jax.weights import TEMPORARY_MARK, abstract_tree, save_params
from train.checkpoints import CheckpointStore

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
CONFIG = {"preset": "digits", "model": {"depth": 2}, "steps": 300}


def state(seed: int, width: int = 64):
    """(params, ema, opt_state) of numpy arrays: a nested dict, a copy, and an optax state with moments that are set."""
    random = np.random.default_rng(seed)
    params = {
        "blocks": {
            "attention": {"kernel": random.standard_normal((2, width, width), np.float32)},
            "scale": random.standard_normal((2, width)).astype(ml_dtypes.bfloat16),
        },
        "head": {"kernel": random.standard_normal((width, 8), np.float32)},
        "table": random.integers(-9, 9, (16,), np.int32),
    }
    noise = jax.tree.map(lambda leaf: np.abs(random.standard_normal(leaf.shape)).astype(leaf.dtype), params)
    clip, (adam, *rest) = jax.eval_shape(OPTIMIZER.init, params)
    adam = adam._replace(count=np.asarray(seed, np.int32), mu=noise, nu=noise)
    return params, noise, (clip, (adam, *rest))


def position(step: int) -> dict:
    return {"epoch": step // 100, "next_index": 7 * step, "mixture": [0.25, 0.75]}


def save(store: CheckpointStore, step: int, place=lambda tree: jax.tree.map(jnp.asarray, tree), width=64, **kwargs):
    params, ema, opt_state = (place(tree) for tree in state(step, width))
    return store.save(
        step, params=params, ema=ema, opt_state=opt_state, data_position=position(step), config=CONFIG, **kwargs
    )


def on_mesh():
    """Puts a tree on all devices: matrices split by their columns, the rest on every device."""
    count = jax.device_count()
    data = 2 if count % 2 == 0 else 1
    mesh = jax.make_mesh((data, count // data), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def place(leaf):
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp") if leaf.ndim > 1 else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return lambda tree: jax.tree.map(place, tree)


def same_bits(got, want) -> None:
    """Fails unless both trees have the same structure, types, shapes, dtypes and bytes."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for have, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert have.dtype == expected.dtype
        shards = have.addressable_shards if isinstance(have, jax.Array) else []
        for shard in shards:
            expected_part = np.asarray(expected)[shard.index]
            assert np.asarray(shard.data).tobytes() == expected_part.tobytes()


def open_store(directory: str | Path, keep_last=3, keep_every=None, asynchronous=True) -> CheckpointStore:
    return CheckpointStore(directory, keep_last=keep_last, keep_every=keep_every, asynchronous=asynchronous)


def restore_and_compare(directory, place, step=None):
    with open_store(directory) as store:
        expected_step = store.latest_step() if step is None else step
        expected = state(expected_step)
        placed = [place(tree) for tree in expected]
        restored = store.restore(*[abstract_tree(tree) for tree in placed], step=step)
    assert restored.step == expected_step
    assert restored.data_position == position(expected_step)
    assert restored.config == CONFIG
    for got, want, like in zip((restored.params, restored.ema, restored.opt_state), expected, placed):
        same_bits(got, want)
        assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(like)))
    return restored


def save_on_all_devices(directory):
    with open_store(directory) as store:
        save(store, 100, on_mesh())
        save(store, 200, on_mesh())
    print("saved on", jax.device_count())


def restore_on_all_devices(directory):
    restored = restore_and_compare(directory, on_mesh())
    kernel = restored.params["blocks"]["attention"]["kernel"]
    assert len(kernel.sharding.device_set) == jax.device_count()
    print("restored on", jax.device_count())


def killed_while_saving(directory):
    """Kills itself as soon as array data of step 300 is on the disk."""
    store = open_store(directory)
    save(store, 200, wait=True)
    partial = Path(directory) / f"300{TEMPORARY_MARK}"

    def kill():
        while not any(f.is_file() for f in partial.glob("*/ocdbt.process_0/d/*")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    save(store, 300, width=2048, wait=True)


def killed_at(directory, seconds):
    """Saves as fast as it can and is killed after a while."""
    store = open_store(directory, keep_last=2)
    save(store, 1, wait=True)
    print("first save done", flush=True)
    threading.Timer(float(seconds), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    for step in range(2, 10_000):
        save(store, step)


def refused_by_the_disk(directory, then):
    """The file size limit makes writes fail as a full disk does."""
    store = open_store(directory)
    save(store, 100, wait=True)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    save(store, 200, width=512)  # asynchronous: the failure comes later
    print("save returned", flush=True)
    if then == "stop":
        store.wait()
    try:
        save(store, 300)
    except ValueError as error:
        print("next save raised:", error, flush=True)
    assert store.steps() == [100]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    save(store, 400)
    store.close()
    print("steps", store.steps(), flush=True)


def fails_for_another_reason_while_the_disk_refuses(directory):
    with open_store(directory) as store:
        save(store, 100, wait=True)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        save(store, 200, width=512)
        raise ZeroDivisionError("the other reason")


def converted_weights_refused_by_the_disk(directory):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    save_params(directory, state(1, 512)[0])


def one_of_two_processes(directory, index, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
    place = on_mesh()
    with open_store(directory, keep_last=1) as store:
        for step in (100, 200):
            save(store, step, place)
    restore_and_compare(directory, place)
    data = Path(directory) / "200" / "params" / "manifest.ocdbt"
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("restored")
    if index == "0":
        os.truncate(data, 10)
    multihost_utils.sync_global_devices("cut")
    try:
        restore_and_compare(directory, place)
    except ValueError as error:
        print(f"process {index}: {error}", flush=True)


def one_of_two_processes_refused_by_the_disk(directory, index, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
    place = on_mesh()
    with open_store(directory) as store:
        save(store, 100, place, wait=True)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        save(store, 200, place, width=512)


def main() -> None:
    _, mode, *arguments = sys.argv
    globals()[mode](*arguments)


if __name__ == "__main__":
    run_command_line(main)
