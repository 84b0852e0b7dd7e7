"""Label a dataset with every teacher of a hierarchy, once, and keep the pool.

    python recipes/build_pool.py --dataset data/digits --hierarchy teachers/hierarchy.yaml --pool_dir pools/digits
    python recipes/build_pool.py --dataset user/photos --hierarchy user/teachers --pool_dir pools/photos \\
        --push_to_hub user/photos-pool

`PseudolabelPool.load` opens the folder or the Hub id, and so does `datasets.load_dataset`, a teacher at a time. A run
that was stopped goes on where it was when it is started again, also where only the push is missing; on several GPUs,
start it by `accelerate launch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hf_cosupervise import PseudolabelPool, TeacherHierarchy, build_pool, load_hierarchy
from hf_cosupervise.arguments import parse_recipe_args
from hf_cosupervise.hub.client import is_folder, open_repo
from hf_cosupervise.processes import join_processes


@dataclass
class PoolArguments:
    """Say what is labelled by whom, and where the pool goes."""

    dataset: str = field(metadata={"help": "Folder of `save_to_disk`, or Hub id."})
    hierarchy: str = field(metadata={"help": "File written by `TeacherHierarchy.save`, or Hub id."})
    pool_dir: str = field(metadata={"help": "Folder to write."})
    split: str = field(default="train", metadata={"help": "Split to label."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset on the Hub."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    streaming: bool = field(default=False, metadata={"help": "Read the dataset on the Hub row by row."})
    hierarchy_revision: str | None = field(default=None, metadata={"help": "Likewise of the hierarchy on the Hub."})
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
        default=None,
        metadata={"help": "Folder or Hub id of a pool of the same data, whose teachers are not run again."},
    )
    reuse_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of that pool."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id of the data set that the pool becomes."})
    private: bool = field(default=False, metadata={"help": "Make the data set private. Default: the user's setting."})
    license: str | None = field(default=None, metadata={"help": "Licence for its card, such as cc-by-4.0."})
    push_inputs: bool = field(default=True, metadata={"help": "Whether the inputs are pushed too."})


def find_finished(args: PoolArguments, hierarchy: TeacherHierarchy) -> PseudolabelPool | None:
    """Give the pool of an earlier run that is still to be pushed."""
    if args.push_to_hub is None or not Path(args.pool_dir, "pool.json").is_file():
        return None
    pool = PseudolabelPool.load(args.pool_dir)
    source = pool.source or {}
    # Of data in a folder nothing is known.
    is_same = is_folder(args.dataset) or (source.get("dataset"), source.get("split")) == (args.dataset, args.split)
    return pool if is_same and pool.hierarchy == hierarchy else None


def label(args: PoolArguments, hierarchy: TeacherHierarchy) -> PseudolabelPool:
    """Build the pool."""
    return build_pool(
        args.dataset,
        hierarchy,
        split=args.split,
        revision=args.revision,
        config_name=args.config_name,
        streaming=args.streaming,
        input_column=args.input_column,
        oracle_column=args.oracle_column,
        oracle_domain_column=args.oracle_domain_column,
        pool_k=args.pool_k,
        batch_size=args.batch_size,
        output_dir=args.pool_dir,
        precision=args.precision,
        num_workers=args.num_workers,
        on_error=args.on_error,
        reuse=None if args.reuse is None else PseudolabelPool.load(args.reuse, revision=args.reuse_revision),
    )


def main() -> None:
    """Build the pool, and push it where that is wanted."""
    (args,) = parse_recipe_args([PoolArguments])
    processes, private = join_processes(), args.private or None
    if args.push_to_hub is not None:  # access is missing now, or not after hours of labelling
        processes.on_first(partial(open_repo, args.push_to_hub, what="The pool", repo_type="dataset", private=private))
    hierarchy = load_hierarchy(args.hierarchy, revision=args.hierarchy_revision)
    pool = find_finished(args, hierarchy)
    if pool is None:
        pool = label(args, hierarchy)
    if processes.rank == 0:
        print(f"{pool} in {args.pool_dir}")
    if args.push_to_hub is not None:
        pushed = pool.push_to_hub(args.push_to_hub, private=private, license=args.license, inputs=args.push_inputs)
        if processes.rank == 0:
            print(f"pushed to {pushed.commit_url}")


if __name__ == "__main__":
    main()
