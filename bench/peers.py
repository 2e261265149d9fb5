"""The systems that `compare.py` times, each behind the same few methods and in a process of its own.

Separate processes, because Keras reads its backend from the environment once, frameworks have their own thread pools,
and a peer that crashes must not end the others. The parent calls one at a time, so that none works while another is
timed.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from common import DECODES, continued, seconds

# Threads of another process may spin for a moment after their work.
_PAUSE = 0.1


def torch_device() -> str:
    """Where torch has to be for its peers to run on what `JAX_PLATFORMS` names."""
    return "cuda" if os.environ.get("JAX_PLATFORMS") == "cuda" else "cpu"


@dataclass(frozen=True)
class Case:
    """One kind of call.

    Attributes:
        decode: one of `DECODES`.
        prompts: int [B, P], without padding.
        new_tokens: of each row; there is no eos before.
    """

    decode: str
    prompts: np.ndarray
    new_tokens: int


class Peer:
    """A system with the weights of a Hugging Face folder."""

    packages: ClassVar[tuple[str, ...]] = ()

    def generate(self, case: Case) -> np.ndarray:
        """Int [B, T]: the new tokens."""
        raise NotImplementedError

    def refuses(self, case: Case) -> str | None:
        """Why there can be no such call, if so."""
        del case
        return None

    def memory(self, case: Case) -> float:
        """The most memory that its process has had so far, in MB; the case does not matter."""
        del case
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def close(self) -> None:
        """Ends what it runs in."""

    def first(self, case: Case) -> tuple[float, np.ndarray]:
        """Seconds of a call as it comes, and its tokens."""
        start = time.perf_counter()
        tokens = self.generate(case)
        return time.perf_counter() - start, tokens

    def timed(self, case: Case) -> float:
        """Seconds of a call like one before."""
        time.sleep(_PAUSE)
        taken = seconds(lambda: self.generate(case))
        if taken < _PAUSE:  # so short that it matters whose data the processor's caches hold
            taken = seconds(lambda: self.generate(case))
        return taken


class Jaxgen(Peer):
    def __init__(self, folder: str, dtype: str):
        import jaxgen

        self._model = jaxgen.load(folder, dtype=dtype)

    def generate(self, case: Case) -> np.ndarray:
        arguments = DECODES[case.decode] | ({"key": 0} if DECODES[case.decode].get("do_sample") else {})
        return continued(self._model, case.prompts, case.new_tokens, **arguments)[:, case.prompts.shape[1] :]


class Transformers(Peer):
    """Transformers on torch, with the cache that it takes by itself; eager."""

    packages = ("torch", "transformers")
    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: str, dtype: str):
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = model.to(torch_device()).eval()

    def generate(self, case: Case) -> np.ndarray:
        import torch

        prompts = torch.tensor(case.prompts, device=torch_device())
        arguments = {"max_new_tokens": case.new_tokens, "eos_token_id": None, **DECODES[case.decode], **self.arguments}
        output = self._model.generate(prompts, attention_mask=torch.ones_like(prompts), **arguments)
        return output[:, prompts.shape[1] :].cpu().numpy()


class TransformersStatic(Transformers):
    """With a cache of fixed size, which transformers compiles for on accelerators only; eager."""

    arguments: ClassVar[dict[str, Any]] = {"cache_implementation": "static"}


class TransformersCompiled(TransformersStatic):
    """With a cache of fixed size and torch.compile, which on a CPU has to be asked for."""

    def __init__(self, folder: str, dtype: str):
        from transformers import CompileConfig

        super().__init__(folder, dtype)
        config = CompileConfig()
        config._compile_all_devices = True
        self.arguments = {**self.arguments, "compile_config": config}

    def refuses(self, case: Case) -> str | None:
        return "transformers runs beams uncompiled" if case.decode == "beams" else None


class KerasHub(Peer):
    """KerasHub on the JAX backend."""

    packages = ("keras", "keras_hub")

    def __init__(self, folder: str, dtype: str):
        os.environ["KERAS_BACKEND"] = "jax"
        import json

        import keras_hub

        # What the conversion forgets.
        epsilon = json.loads((Path(folder) / "config.json").read_text())["rms_norm_eps"]
        backbone = keras_hub.models.Llama3Backbone.from_preset(folder, dtype=dtype, layer_norm_epsilon=epsilon)
        self._model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
        self._samplers = {
            "greedy": keras_hub.samplers.GreedySampler(),
            "sampling": keras_hub.samplers.TopPSampler(p=0.9, k=50, seed=0),
            "beams": keras_hub.samplers.BeamSampler(num_beams=4),
        }
        self._decode = ""

    def generate(self, case: Case) -> np.ndarray:
        if case.decode != self._decode:  # or else it would compile at every call
            self._model.compile(sampler=self._samplers[case.decode])
            self._decode = case.decode
        columns = case.prompts.shape[1]
        given = {
            "token_ids": np.pad(case.prompts, ((0, 0), (0, case.new_tokens))).astype(np.int32),
            "padding_mask": np.pad(np.ones_like(case.prompts, bool), ((0, 0), (0, case.new_tokens))),
        }
        return np.asarray(self._model.generate(given, stop_token_ids=None)["token_ids"])[:, columns:]


class LlamaCpp(Peer):
    """llama.cpp behind llama-cpp-python, on a GGUF file of the same weights in the same dtype."""

    packages = ("llama_cpp", "gguf")

    def __init__(self, folder: str, dtype: str):
        import llama_cpp
        from gguf_file import write_gguf

        file = Path(folder) / f"{dtype}.gguf"
        write_gguf(Path(folder), file, dtype)
        threads = os.cpu_count()
        self._model = llama_cpp.Llama(
            str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, seed=0, verbose=False
        )

    def refuses(self, case: Case) -> str | None:
        if torch_device() != "cpu":
            return "llama-cpp-python is compared on the CPU"
        if case.decode == "beams":
            return "llama-cpp-python has no beams"
        return "llama-cpp-python generates one text at a time" if len(case.prompts) > 1 else None

    def generate(self, case: Case) -> np.ndarray:
        self._model.reset()  # or else it would keep the prompt of the last call
        temperature, top_k, top_p = (1.0, 50, 0.9) if case.decode == "sampling" else (0.0, 1, 1.0)
        tokens = self._model.generate(
            case.prompts[0].tolist(), top_k=top_k, top_p=top_p, min_p=0.0, temp=temperature, repeat_penalty=1.0
        )
        return np.array([[next(tokens) for _ in range(case.new_tokens)]])


PEERS: dict[str, type[Peer]] = {
    "jaxgen": Jaxgen,
    "transformers": Transformers,
    "transformers-static": TransformersStatic,
    "transformers-compiled": TransformersCompiled,
    "keras-hub": KerasHub,
    "llama.cpp": LlamaCpp,
}


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(package) for package in PEERS[name].packages)


class Missing(Peer):
    """A peer that could not be started, and why."""

    def __init__(self, reason: str):
        self._reason = reason

    def refuses(self, case: Case) -> str | None:
        return self._reason


class Worker(Peer):
    """A peer in a process of its own.

    Raises:
        RuntimeError: at any method, with what the peer raised.
    """

    def __init__(self, name: str, folder: str, dtype: str):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, folder, dtype), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def _ask(self, method: str, case: Case) -> Any:
        with contextlib.suppress(OSError):  # it has ended, which is the answer
            self._pipe.send((method, case))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"the process ended with {self._process.exitcode}") from None
        if error:
            raise RuntimeError(error)
        return value

    def refuses(self, case: Case) -> str | None:
        return self._ask("refuses", case)

    def first(self, case: Case) -> tuple[float, np.ndarray]:
        return self._ask("first", case)

    def timed(self, case: Case) -> float:
        return self._ask("timed", case)

    def memory(self, case: Case) -> float:
        return self._ask("memory", case)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        self._process.terminate()  # torch.compile's own helpers may keep it from ending


def _serve(pipe: Any, name: str, folder: str, dtype: str) -> None:
    """Answers (method, case) with (error, value) until the other end is closed."""
    peer = None
    try:
        peer = PEERS[name](folder, dtype)
        pipe.send((None, None))
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", None))
    while peer is not None:
        try:
            method, case = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, getattr(peer, method)(case)))
        except Exception as error:
            pipe.send((f"{type(error).__name__}: {error}", None))
