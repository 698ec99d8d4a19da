"""The training of a job under torchrun: what Ray is compared with. ``torchrun -m onestage.bench.torchrun JOB.json``.

Rank 0 prints a JSON line a progress message, with the time of day in seconds as ``at``.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Trains on this machine's processes that torchrun started."""
    import torch
    from pytorch_lightning.strategies import DDPStrategy

    from onestage.cluster import worker

    job = json.loads(Path(sys.argv[1]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cluster = job["config"]["cluster"]
    torch.set_num_threads(cluster["cpus_per_worker"])
    gpu = bool(cluster["gpus_per_worker"])

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message | {"at": time.time()}), flush=True)

    worker.train(
        job,
        rank=rank,
        world_size=world_size,
        trainer_options={
            "accelerator": "gpu" if gpu else "cpu",
            "devices": world_size,
            "strategy": DDPStrategy(process_group_backend="nccl" if gpu else "gloo", gradient_as_bucket_view=True),
        },
        progress=tell if rank == 0 else lambda _: None,
    )


if __name__ == "__main__":
    main()
