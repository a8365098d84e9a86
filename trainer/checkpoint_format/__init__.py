"""The checkpoint format: a folder of safetensors files and a manifest, without pickles.

Each tensor in a file is a chunk of a full tensor under its Hugging Face name, so that any layout can write a checkpoint
and any other layout can read it. The manifest locates every chunk, records the hash of each file, and holds all
non-tensor state. A folder without a valid manifest is not a checkpoint.
"""

from trainer.checkpoint_format.files import (
    MAX_FILE_BYTES,
    TensorChunk,
    TensorIndex,
    split_into_files,
    write_chunks,
    write_safetensors,
)
from trainer.checkpoint_format.manifest import (
    BUFFER,
    DTYPES,
    FORMAT,
    MANIFEST,
    MODEL_ROLES,
    WEIGHT,
    Chunk,
    FileRecord,
    Manifest,
    StoredTensor,
    checksum,
    is_checkpoint,
    read_manifest,
)
from trainer.checkpoint_format.reader import ChunkReader, verify_files, verify_sizes

__all__ = [
    "BUFFER",
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "MAX_FILE_BYTES",
    "MODEL_ROLES",
    "WEIGHT",
    "Chunk",
    "ChunkReader",
    "FileRecord",
    "Manifest",
    "StoredTensor",
    "TensorChunk",
    "TensorIndex",
    "checksum",
    "is_checkpoint",
    "read_manifest",
    "split_into_files",
    "verify_files",
    "verify_sizes",
    "write_chunks",
    "write_safetensors",
]
