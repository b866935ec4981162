"""A trainer of another project: its end of the group is made by torch's own helper, and it speaks plain HTTP.

python foreign_trainer.py URL WEIGHTS FLATTENED LAST: broadcasts the tensors in two buckets under version "foreign"; is killed
before tensor number LAST, if there is one.
"""

import json
import os
import socket
import sys
import threading
import urllib.request
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper
from torch.distributed.rendezvous import rendezvous

url, weights, flattened, last = sys.argv[1], sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
NAME = "foreign"


def post(path: str, **body: object) -> dict[str, object]:
    data = json.dumps({**body, "group_name": NAME}).encode()
    request = urllib.request.Request(url + path, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
joining = threading.Thread(target=post, args=("/init_weights_update_group",), kwargs=place)
joining.start()
timeout = timedelta(seconds=60)
store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=timeout))
store.set_timeout(timeout)
group, _ = _new_process_group_helper(
    world_size, rank, [], Backend("gloo"), PrefixStore(NAME, store), group_name=NAME, timeout=timeout
)
joining.join()

tensors = load_file(weights)
sent = 0
for names in (list(tensors)[::2], list(tensors)[1::2]):
    described = {
        "names": names,
        "dtypes": [str(tensors[name].dtype) for name in names],
        "shapes": [list(tensors[name].shape) for name in names],
        "weight_version": "foreign",
        "load_format": "flattened_bucket" if flattened else None,
    }
    receiving = threading.Thread(target=post, args=("/update_weights_from_distributed",), kwargs=described, daemon=True)
    receiving.start()
    parts = [tensors[name] for name in names]
    if flattened:
        parts = [torch.cat([part.flatten().view(torch.uint8) for part in parts])]
    for part in parts:
        if sent == last:
            os._exit(9)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        group.broadcast([part], options).wait()
        sent += 1
    receiving.join()
sys.stdout.write(json.dumps(post("/destroy_weights_update_group")))
