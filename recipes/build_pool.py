"""Label a dataset with every teacher of a hierarchy, once, and keep the pool.

    python recipes/build_pool.py --dataset data/digits --hierarchy teachers/hierarchy.yaml --pool_dir pools/digits

`PseudolabelPool.load` opens the folder, and so does `datasets.load_dataset`, a teacher at a time. A run that was
stopped goes on where it was when it is started again; on several GPUs, start it by `accelerate launch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset, load_from_disk

from hf_cosupervise import PseudolabelPool, TeacherHierarchy, build_pool
from hf_cosupervise.script_utils import parse_recipe_args


@dataclass
class PoolArguments:
    """Say what is labelled by whom."""

    dataset: str = field(metadata={"help": "Folder of `save_to_disk`, or Hub id."})
    hierarchy: str = field(metadata={"help": "File written by `TeacherHierarchy.save`."})
    pool_dir: str = field(metadata={"help": "Folder to write."})
    split: str = field(default="train", metadata={"help": "Split to label."})
    input_column: str | None = field(default=None, metadata={"help": "Column that models read. Default: found."})
    oracle_column: str | None = field(
        default=None, metadata={"help": "Column of ground truth, kept for analysis only. Undeclared, it is refused."}
    )
    oracle_domain_column: str | None = field(default=None, metadata={"help": "Column of the true domain, likewise."})
    pool_k: int | None = field(default=None, metadata={"help": "Labels kept per row. Default: min(16, all)."})
    batch_size: int = field(default=64, metadata={"help": "Rows per forward pass."})
    precision: str = field(default="float32", metadata={"help": "float32, or mixed precision: bfloat16 or float16."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode inputs; 0: this one."})
    on_error: str = field(
        default="raise",
        metadata={"help": "A row that cannot be read or breaks a teacher: raise, or leave it missing."},
    )
    reuse: str | None = field(
        default=None, metadata={"help": "Folder of a pool of the same data, whose teachers are not run again."}
    )


def main() -> None:
    """Build the pool."""
    (args,) = parse_recipe_args([PoolArguments])
    data = load_from_disk(args.dataset) if Path(args.dataset).is_dir() else load_dataset(args.dataset)
    pool = build_pool(
        data[args.split],
        TeacherHierarchy.load(args.hierarchy),
        input_column=args.input_column,
        oracle_column=args.oracle_column,
        oracle_domain_column=args.oracle_domain_column,
        pool_k=args.pool_k,
        batch_size=args.batch_size,
        output_dir=args.pool_dir,
        precision=args.precision,
        num_workers=args.num_workers,
        on_error=args.on_error,
        reuse=None if args.reuse is None else PseudolabelPool.load(args.reuse),
    )
    print(f"{pool} in {args.pool_dir}")


if __name__ == "__main__":
    main()
