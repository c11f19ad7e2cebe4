"""Whether a model directory can be loaded, from its small files and the headers of its weights: before any rank waits
for another and before servers start."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.fields import read_json_object
from megatron_rl.models.registry import tensors_of
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.models.weights_io import check_names


def check_model(directory: Path, value_head: bool = False) -> None:
    """Raises ModelError, which names the file, for all but values that are not finite: those show when they are read.

    With `value_head` the directory is a critic's.
    """
    check_weights(directory, value_head)
    load_tokenizer(directory)


def check_weights(directory: Path, value_head: bool = False, *, values: bool = False) -> None:
    """The same without the tokenizer; with `values` every weight is read, too. Raises ModelError."""
    arch = read_architecture(directory, value_head)
    files = TensorFiles(directory)
    files.check_listing()
    for name in check_names(files, arch):
        files.check_copy(name)
    held = set(files.names)
    for source in dict.fromkeys(files.stored(part).whole for parts in tensors_of(arch) for part in parts):
        if source.name not in held:
            continue  # check_names has let pass what may be absent
        files.check(source)
        if values:
            files.read(source, 0, 0, source.shape[0])


def check_files(directory: Path) -> None:
    """The same for a model of any architecture, such as a server may have. Raises ModelError."""
    read_json_object(directory / "config.json")
    TensorFiles(directory).check_listing()
    load_tokenizer(directory)
