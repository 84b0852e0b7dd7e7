"""TRL's trainers that distil take the exports as they are: several teachers by `teacher_id`, and one at a time."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_answer_pools import make_pool
from test_prompted import save_language_model

trl = pytest.importorskip("trl")
COMMON: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
COMMON |= {"save_strategy": "no", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False}


@contextmanager
def model_servers() -> Iterator[tuple[str, list[tuple[str, list[int]]]]]:
    """What vLLM's servers answer, that of each model below its name; and what they were asked."""
    asked: list[tuple[str, list[int]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": self.path.split("/")[1]}]})

        def do_POST(self) -> None:
            name, body = self.path.split("/")[1], json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((name, body["prompt"]))
            likely = [{str(token): {"logprob": -0.1, "rank": 1}} for token in body["prompt"]]
            self.answer({"choices": [{"token_ids": [7, 8, 1], "prompt_logprobs": [None, *likely[1:]]}]})

        def answer(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def moved(trainer: Any) -> bool:
    """Train a step, and tell whether any weight is another."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert np.isfinite(trainer.train().training_loss)
    return any(not value.equal(before[name]) for name, value in trainer.model.state_dict().items())


def test_each_prompt_goes_to_the_server_of_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("trl.experimental.async_distillation")
    worker = pytest.importorskip("trl.experimental.async_distillation.async_rollout_worker")
    import torch
    from transformers import AutoTokenizer

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")  # the trainer asks how fast it is
    routed = make_pool(chat=True).to_routed("majority")
    assert routed["teacher_id"][:] == ["all", "sums", "sums"]
    folder = save_language_model(tmp_path / "student", "llama", "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Worker:
        """TRL's own loop in a thread, where it starts a process beside vLLM."""

        def __init__(self, address: str, urls: dict[str, str]) -> None:
            self.rollout_buffer, self.metrics_queue = queue.Queue(64), queue.Queue(4096)
            self.loop = worker._AsyncRolloutLoop(
                model_name=folder,
                dataset=routed,
                processing_class=tokenizer,
                eos_token_ids=[1],
                rollout_buffer=self.rollout_buffer,
                model_version_value=SimpleNamespace(value=0),
                heartbeat_value=SimpleNamespace(value=0.0),
                failed_event=threading.Event(),
                exception_info_queue=queue.Queue(1),
                metrics_queue=self.metrics_queue,
                max_inflight_tasks=3,
                vllm_server_url=f"{address}/student",
                teacher_server_urls=urls,
                teacher_top_k=1,
            )
            self.thread = threading.Thread(target=self.loop.run, daemon=True)
            self.start = self.thread.start

        def stop(self) -> None:
            if self.thread.is_alive():
                self.loop._loop.call_soon_threadsafe(self.loop._stop_event.set)
                self.thread.join(20)

        def update_model_version(self, model_version: int) -> None:
            self.loop._model_version_value.value = model_version

        def check_health(self, stale_after_s: float) -> None:
            assert self.thread.is_alive()

    with model_servers() as (address, asked):
        urls = {name: f"{address}/{name}" for name in ("all", "sums")}
        args = package.AsyncDistillationConfig(
            str(tmp_path / "out"),
            teacher_server_urls=urls,
            teacher_top_k=1,
            token_budget=0,
            max_completion_length=4,
            model_init_kwargs={"attn_implementation": "sdpa"},
            dtype="float32",
            **COMMON | {"per_device_train_batch_size": 3},
        )
        transfer = SimpleNamespace(
            **dict.fromkeys(("init_weight_transfer", "pause", "resume", "destroy"), lambda: None),
            send_weights=lambda weights: [None for _ in weights],
        )
        ours = Worker(address, urls)
        trainer = package.AsyncDistillationTrainer(
            folder, args, routed, processing_class=tokenizer, rollout_worker=ours, weight_transfer=transfer
        )
        assert moved(trainer)  # and at its end it stops the worker
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in routed]
    whole = [(name, [*ids, 7, 8, 1]) for name, ids in zip(routed["teacher_id"], prompts, strict=True)]
    assert all(one in asked for one in whole) and all(one in whole for one in asked if one[0] != "student")


@pytest.mark.parametrize("chat", [False, True])
def test_one_teacher_at_a_time_beside_the_student(chat: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_language_model(tmp_path / "model", "llama", "chat" if chat else "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    teacher.lm_head.weight.data += 1
    own = make_pool(chat).to_routed("majority").filter(lambda row: row["teacher_id"] == "sums")
    args = trl.DistillationConfig(str(tmp_path / "out"), max_completion_length=4, **COMMON)
    assert moved(trl.DistillationTrainer(student, teacher, args, own, processing_class=tokenizer))


@pytest.mark.parametrize("name", ["gkd.GKD", "gold.GOLD", "iw_opd.IWOPD"])
def test_answers_of_a_teacher_and_of_the_student_itself(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    room, kind = name.split(".")
    package = pytest.importorskip(f"trl.experimental.{room}")
    folder = save_language_model(tmp_path / "model", "llama", "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    teacher.lm_head.weight.data += 1
    data = make_pool(chat=True).to_sft("majority", messages=True)
    lengths = {"max_new_tokens" if room == "gkd" else "max_completion_length": 4, "max_length": 60}
    args = getattr(package, f"{kind}Config")(str(tmp_path / "out"), **lengths, **COMMON)
    maker = getattr(package, f"{kind}Trainer")
    assert moved(maker(student, teacher, args=args, train_dataset=data, processing_class=tokenizer))


@pytest.mark.parametrize("chat", [False, True])
def test_a_student_that_is_its_own_teacher_is_told_the_chosen_answer(chat: bool, tmp_path: Path) -> None:
    package = pytest.importorskip("trl.experimental.sdft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_language_model(tmp_path / "model", "llama", "chat" if chat else "")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    data = make_pool(chat).to_sft("majority").rename_column("completion", "privileged_context")
    args = package.SDFTConfig(str(tmp_path / "out"), max_completion_length=4, num_generations=2, **COMMON)
    assert moved(package.SDFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer))
