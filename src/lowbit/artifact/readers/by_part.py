"""A GGUF file of which transformers sees some tensors at a time."""

import contextlib

from by_block import CannotStream, blocks_of


class Parts:
    """What lies in a file for each block; takes the place of `by_block.Files`.

    Rests on `load_gguf_checkpoint` of transformers 5, which takes the reader from the gguf package
    whenever it opens a file. Of the architectures that transformers (5.23) reads in another way
    none is exported.

    Attributes:
        blocks: name of the module list.
    """

    def __init__(self, path):
        import gguf

        self._path, self._reader = str(path), gguf.GGUFReader(str(path))
        self.blocks, self._model, self._names = None, None, None

    def of(self, _folder, model, config):
        """The parts, once it is known of which model."""
        if getattr(config.hf_quantizer, "supported", False):
            raise CannotStream
        self.blocks, self._model = blocks_of(model), model
        return self

    @contextlib.contextmanager
    def nothing(self):
        """Meanwhile the file seems to hold no tensor."""
        with self._shown([], self._reader.fields):
            yield

    def tensors(self, block):
        """Tensors of a block, of everything outside them for None, in float32."""
        try:
            from transformers import modeling_gguf_pytorch_utils as utils

            named = utils.get_gguf_hf_weights_map
        except (ImportError, AttributeError):
            raise CannotStream from None
        own = [t for t in self._reader.tensors if _block_of(t.name) == block]
        # Reading a vocabulary, or naming the tensors, takes longer than a block.
        fields = {k: f for k, f in self._reader.fields.items() if not k.startswith("tokenizer.")}
        utils.get_gguf_hf_weights_map = self._once(named)
        try:
            with self._shown(own, fields):
                found = utils.load_gguf_checkpoint(
                    self._path, return_tensors=True, model_to_load=self._model
                )
        finally:
            utils.get_gguf_hf_weights_map = named
        return found["tensors"]

    def _once(self, named):
        def names(*given, **of_a_part):
            if of_a_part:  # it calls itself
                return named(*given, **of_a_part)
            if self._names is None:
                self._names = named(*given)
            return dict(self._names)

        return names

    @contextlib.contextmanager
    def _shown(self, tensors, fields):
        import gguf

        whole = gguf.GGUFReader
        gguf.GGUFReader = lambda *_: _Some(self._reader, tensors, fields)
        try:
            yield
        finally:
            gguf.GGUFReader = whole


class _Some:
    """A reader that shows some tensors and fields."""

    def __init__(self, reader, tensors, fields):
        self._reader, self.tensors, self.fields = reader, tensors, fields

    def __getattr__(self, name):
        return getattr(self._reader, name)


def _block_of(tensor):
    kind, _, rest = tensor.partition(".")
    return int(rest.partition(".")[0]) if kind == "blk" else None
