"""Text sources, tokenizers and packing; generated tasks.

>>> data = prepare({"name": "stdlib"}, {"name": "bpe", "vocab_size": 4096}, workdir)
>>> batches = train_iterator(data.train, length=1024, batch_size=8, seed=0)
>>> batch = next(batches)  # tokens, targets, loss_mask, segment_ids, positions
"""

from pipelines.baselines import bits_per_byte, gzip_bits_per_byte, unigram_bits_per_byte
from pipelines.dataset import TextDataset, TokenizedDocuments, prepare
from pipelines.errors import DataError
from pipelines.packing import evaluation_iterator, train_iterator
from pipelines.sources import SOURCES, Document, Source, make_source
from pipelines.stdlib_text import StdlibText
from pipelines.synthetic import TASKS, Task, TaskDataset, make_task
from pipelines.tokenizers import (
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    NucleotideTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "SOURCES",
    "TASKS",
    "TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "DataError",
    "Document",
    "NucleotideTokenizer",
    "Source",
    "StdlibText",
    "Task",
    "TaskDataset",
    "TextDataset",
    "TokenizedDocuments",
    "Tokenizer",
    "bits_per_byte",
    "evaluation_iterator",
    "gzip_bits_per_byte",
    "load_tokenizer",
    "make_source",
    "make_task",
    "prepare",
    "train_bpe",
    "train_iterator",
    "unigram_bits_per_byte",
]
