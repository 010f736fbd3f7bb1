"""Share a whole Hugging Face pipeline: model, tokenizer and everything else.

Run it with `python examples/hf_text_classification.py`. The pipeline is a tiny BERT
with random weights, so that nothing is downloaded. `transformers.pipeline("text-classification")`
works the same way.
"""

import numpy as np
import ray
from ray_zerocopy import ModelWrapper
from ray_zerocopy.data import map_batches
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    TextClassificationPipeline,
)

TEXTS = ["a fine film", "a dull film", "fine acting", "dull and long"] * 10


def classifier():
    words = ["[PAD]", "[UNK]", *sorted(set(" ".join(TEXTS).split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=64, **size)
    return TextClassificationPipeline(
        model=BertForSequenceClassification(config).eval(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ),
        device="cpu",
    )


def main():
    pipeline = classifier()
    wrapper = ModelWrapper.from_model(pipeline)

    # Ray Data: the pipeline takes a list of texts and returns one dict per text.
    rows = ray.data.from_items([{"text": text} for text in TEXTS])
    scored = map_batches(
        rows,
        wrapper,
        actors=2,
        batch_size=10,
        num_cpus=0.5,
        preprocess=lambda batch: {"text": batch["text"].tolist()},
        postprocess=lambda found: {key: [each[key] for each in found] for key in found[0]},
    )
    found = {row["text"]: (row["label"], row["score"]) for row in scored.take_all()}
    for text, (label, score) in found.items():
        print(f"{text:15} {label} {score:.2f}")

    # Tasks: the model runs in the task, the tokenizer here. The pipeline reads the signature of
    # its model's `forward` here, too.
    fast = ModelWrapper.for_tasks(pipeline, method_names=["forward"])
    for text, expected in zip(TEXTS[:4], pipeline(TEXTS[:4]), strict=True):
        for label, score in (fast(text)[0].values(), found[text]):
            assert label == expected["label"]
            assert np.isclose(score, expected["score"], atol=1e-4)


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    main()
    ray.shutdown()
