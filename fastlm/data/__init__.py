"""Text to packed batches: documents, tokenizer, token shards, packing, and the resumable loader.

prepared = prepare("stdlib", cache_directory)
loader = PackedLoader(prepared.train, batch_size=8, sequence_length=256)
held_out = PackedLoader(prepared.held_out, batch_size=8, sequence_length=256).one_pass()

Documents that are token ids already go into PackedLoader as they are, in any iterable; BatchLoader takes batches that
another loader makes.
"""

from fastlm.data.batch_loader import BatchLoader
from fastlm.data.documents import open_source
from fastlm.data.loader import Batch, OnePass, PackedLoader
from fastlm.data.packing import PackingReport, pack_documents
from fastlm.data.prepare import Facts, Prepared, prepare
from fastlm.data.shards import ShardError, TokenDataset, unigram_bits_per_byte, write_shard
from fastlm.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "BatchLoader",
    "Facts",
    "OnePass",
    "PackedLoader",
    "PackingReport",
    "Prepared",
    "ShardError",
    "TokenDataset",
    "Tokenizer",
    "open_source",
    "pack_documents",
    "prepare",
    "unigram_bits_per_byte",
    "write_shard",
]
