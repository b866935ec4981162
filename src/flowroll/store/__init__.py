"""Rollouts on disk, many of them: a folder that is written while a run goes on, and read while and after.

    store = RolloutStore("runs/7")
    ids = store.append(client.rollout("a red fox", num_outputs_per_prompt=16), rewards=rewards)
    store.add_rewards(dict(zip(ids, later, strict=True)), name="aesthetic")
    for rollout in store.select(weight_version="3", min_reward=0.5):
        ...

A store needs neither an engine nor a server: what it holds can be replayed with a transformer alone. The folder:

    flowroll-store.json              the store's schema version
    shards/00000012.safetensors      what one call of `append` gave, whole or not there at all
    index/00000000-00000015.parquet  a row for each sample of these shards
    notes/00000000-00000000.parquet  rewards and notes that came later

The shards are the truth. The index is made from them, and made again where it is missing.
"""

from flowroll.extras import extra_for

with extra_for("flowroll.store", "store"):
    from flowroll.store.files import RolloutFiles, load_rollouts, open_rollouts, save_rollouts
    from flowroll.store.rollout_store import RolloutStore
    from flowroll.store.selection import Selection, StoredSample

__all__ = ["RolloutFiles", "RolloutStore", "Selection", "StoredSample", "load_rollouts", "open_rollouts", "save_rollouts"]
