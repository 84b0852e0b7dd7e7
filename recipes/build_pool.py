"""Label a dataset with every teacher of a hierarchy, once, and keep the pool.

    python recipes/build_pool.py --dataset data/digits --hierarchy teachers/hierarchy.yaml --pool_dir pools/digits

`PseudolabelPool.load` opens the folder, and so does `datasets.load_dataset`, a teacher at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset, load_from_disk

from hf_cosupervise import TeacherHierarchy, build_pool
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
    )
    print(f"{pool} in {args.pool_dir}")


if __name__ == "__main__":
    main()
