"""A transformers model of which one block is in memory at a time: transformers' own loader fills a
block when it is about to compute, and what it held is dropped when it has.

Rests on four functions inside transformers 5, which `streamed` looks for.
"""

import ctypes
import json
import sys
import threading
from collections import defaultdict
from pathlib import Path


class CannotStream(Exception):
    """This transformers, or this model, has to be loaded whole."""


def streamed(kind, folder, settle, files_of=None, config=None, **options):
    """The model with nothing in its blocks, which fill and empty themselves.

    Args:
        kind: automatic class that loads it. settle: called with every block once it is filled and
            decoded; what lies outside becomes float32.
        files_of: see `Files`, which it is by default. config: of transformers, by default as the
            folder has it. options: of ``from_pretrained``.
    """
    import torch
    import transformers
    from transformers import modeling_utils

    try:
        from transformers.core_model_loading import (  # noqa: F401
            convert_and_load_state_dict_in_model,
            rename_source_key,
        )
    except ImportError:
        raise CannotStream from None
    config = config or transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    files_of, options = files_of or Files, {"dtype": "auto", **options}
    base = modeling_utils.PreTrainedModel
    move = getattr(base, "_move_missing_keys_from_meta_to_device", None)
    load = getattr(base, "_load_pretrained_model", None)
    if move is None or load is None:
        raise CannotStream
    kept = {}

    def only_buffers(self, _missing, *rest):
        move(self, set(), *rest)

    def noted(model, state_dict, files, load_config, *rest, **more):
        """Loads what lies outside the blocks."""
        kept["config"], kept["files"] = load_config, files_of(folder, model, load_config)
        outside = kept["files"].tensors(None)
        return load(model, outside, None, load_config, *rest, **more)

    base._move_missing_keys_from_meta_to_device = only_buffers
    base._load_pretrained_model = staticmethod(noted)
    try:
        model = kind.from_pretrained(folder, config=config, trust_remote_code=False, **options)
    finally:
        base._move_missing_keys_from_meta_to_device = move
        base._load_pretrained_model = staticmethod(load)
    model.eval()
    for held in (*model.parameters(), *model.buffers()):
        if not held.is_meta and held.is_floating_point():
            held.data = held.data.float()
    files, load_config = kept["files"], kept["config"]
    compressor = getattr(load_config.hf_quantizer, "compressor", None)
    if hasattr(model, "ct_decompress_hook"):  # of the whole model, at the first pass
        compressor.remove_decompression_hook(model)
    return Streamed(model, files, load_config, compressor, settle, torch)


def blocks_of(model):
    """Name of the module list that holds a model's blocks."""
    from torch import nn

    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    fitting = [n for n, m in lists.items() if len(m) == count]
    if not fitting:
        raise CannotStream
    # A tower may have as many, and of packed weights only buffers tell the size.
    return max(fitting, key=lambda n: len(lists[n].state_dict()))


class Files:
    """Which tensors of the files belong to which block.

    Attributes:
        blocks: name of the module list. of_block: index of a block, None outside -> names of
            tensors in the files.
    """

    def __init__(self, folder, model, load_config):
        from transformers import core_model_loading as loading

        path = Path(folder, "model.safetensors.index.json")
        if not path.is_file():
            raise CannotStream
        self.folder, self.file_of = Path(folder), json.loads(path.read_text())["weight_map"]
        self.blocks = blocks_of(model)
        mapping = load_config.weight_mapping or []
        renamings = [e for e in mapping if isinstance(e, loading.WeightRenaming)]
        converters = [e for e in mapping if isinstance(e, loading.WeightConverter)]
        known = model.state_dict()
        self.of_block = defaultdict(list)
        for name in self.file_of:
            here, _ = loading.rename_source_key(
                name, renamings, converters, model.base_model_prefix, known
            )
            self.of_block[self._block_of(here)].append(name)

    def _block_of(self, name):
        inside = name.removeprefix(f"{self.blocks}.")
        return None if inside == name else int(inside.partition(".")[0])

    def tensors(self, block):
        """Tensors of a block, of everything outside them for None."""
        from safetensors import safe_open

        by_file, out = defaultdict(list), {}
        for name in self.of_block[block]:
            by_file[self.file_of[name]].append(name)
        for file, names in by_file.items():
            with safe_open(self.folder / file, "pt") as f:
                out.update((n, f.get_tensor(n)) for n in names)
        return out


class Streamed:
    """Computes rows side by side, one block at a time: each row passes alone, as always, and a
    block is filled once.
    """

    def __init__(self, model, files, load_config, compressor, settle, torch):
        self.model, self._files, self._config = model, files, load_config
        self._compressor, self._settle, self._torch = compressor, settle, torch
        self._blocks = model.get_submodule(files.blocks)

    @property
    def blocks(self):
        """How many there are."""
        return len(self._blocks)

    def logits(self, rows, last):
        """(n, last, vocabulary) float32 of rows (n, length)."""
        found, failed = {}, []
        meeting = Meeting(len(rows), self._fill, self._empty)
        hooks = [
            hook
            for i, block in enumerate(self._blocks)
            for hook in (
                block.register_forward_pre_hook(lambda *_, i=i: meeting.enter(i)),
                block.register_forward_hook(lambda *_: meeting.leave()),
            )
        ]

        def one(row):
            try:
                with self._torch.no_grad():
                    out = self.model(rows[row : row + 1], use_cache=False, logits_to_keep=last)
                    found[row] = out.logits[:, -last:].float()
            except BaseException as e:  # raised again below, in the thread that waits
                failed.append(e)
                meeting.end()

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(rows))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for hook in hooks:
            hook.remove()
        if failed:  # the others only say that nobody came
            raise next(e for e in failed if not isinstance(e, threading.BrokenBarrierError))
        return self._torch.cat([found[i] for i in range(len(rows))]).numpy()

    def _fill(self, i):
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        block = self._blocks[i]
        convert_and_load_state_dict_in_model(self.model, self._files.tensors(i), self._config)
        if self._compressor is not None:
            from compressed_tensors.compressors.base import decompress_module

            for module in block.modules():
                if getattr(module, "quantization_scheme", None) is not None:
                    decompress_module(module)
        self._settle(block)
        for name, t in block.state_dict().items():
            if t.is_meta:
                raise ValueError(f"no file has tensor '{self._files.blocks}.{i}.{name}'")

    def _empty(self, i):
        self._blocks[i].to("meta")
        _give_back_memory()


def _give_back_memory():
    """Return freed memory to the system: glibc keeps it, and holes would add up with depth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Meeting:
    """Where rows wait for each other before and after a block; inside it they are alone, one after
    another.

    Args:
        fill, empty: called once with the block's index, before the first and after the last.
    """

    def __init__(self, rows, fill, empty):
        self._block, self._alone, self._inside = None, threading.Lock(), None
        self._before = threading.Barrier(rows, lambda: fill(self._block))
        self._after = threading.Barrier(rows, lambda: empty(self._block))

    def enter(self, i):
        self._block = i
        self._before.wait()
        self._alone.acquire()
        self._inside = threading.get_ident()

    def leave(self):
        self._release()
        self._after.wait()

    def end(self):
        """One of them comes no more."""
        self._before.abort()
        self._after.abort()
        if self._inside == threading.get_ident():
            self._release()

    def _release(self):
        self._inside = None
        self._alone.release()
