"""Train: `deepspeed launch/train.py recipe=R [k=v ...]`; sweep: `python launch/train.py -m ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.cli.train import train

    sys.exit(train(sys.argv[1:]))
