"""Text sources, tokenizers and packing; conversations, responses and preferences; generated tasks.

>>> data = prepare({"name": "stdlib"}, {"name": "bpe", "vocab_size": 4096}, workdir)
>>> batches = train_iterator(data.train, length=1024, batch_size=8, seed=0)
>>> batch = next(batches)  # tokens, targets, loss_mask, segment_ids, positions: [B, T]

>>> data = prepare_responses({"name": "arithmetic", "kind": "pairs"}, {"name": "bytes"}, length=16)
>>> batch = next(data.train_iterator(batch_size=8, seed=0))  # [B, K, T], K = 2: chosen, rejected
"""

from pipelines.baselines import bits_per_byte, gzip_bits_per_byte, unigram_bits_per_byte
from pipelines.chat import TEMPLATES, ChatTemplate, ChatTokens, Marks
from pipelines.dataset import TextDataset, TokenizedDocuments, prepare
from pipelines.errors import DataError
from pipelines.packing import evaluation_iterator, train_iterator
from pipelines.preference import (
    RESPONSE_SOURCES,
    ResponseExample,
    ResponseSource,
    cross_prompt_pairs,
    make_response_source,
)
from pipelines.responses import ResponseDataset, prepare_responses
from pipelines.sources import SOURCES, Document, Source, make_source
from pipelines.stdlib_text import StdlibText
from pipelines.synthetic import TASKS, Task, TaskDataset, arithmetic, make_task
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
    "RESPONSE_SOURCES",
    "SOURCES",
    "TASKS",
    "TEMPLATES",
    "TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "ChatTemplate",
    "ChatTokens",
    "DataError",
    "Document",
    "Marks",
    "NucleotideTokenizer",
    "ResponseDataset",
    "ResponseExample",
    "ResponseSource",
    "Source",
    "StdlibText",
    "Task",
    "TaskDataset",
    "TextDataset",
    "TokenizedDocuments",
    "Tokenizer",
    "arithmetic",
    "bits_per_byte",
    "cross_prompt_pairs",
    "evaluation_iterator",
    "gzip_bits_per_byte",
    "load_tokenizer",
    "make_response_source",
    "make_source",
    "make_task",
    "prepare",
    "prepare_responses",
    "train_bpe",
    "train_iterator",
    "unigram_bits_per_byte",
]
