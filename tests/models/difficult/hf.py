"""What `transformers` has beside plain models: outputs, hooks that stay, a pipeline."""

from collections.abc import Callable

import numpy as np

from models.architectures import ARCHITECTURES, SPEECH
from models.case import Case, entry

TABLE: dict[str, Callable[[], Case]] = {}
_difficult = entry(TABLE)


@_difficult
def hf_output():
    return Case(ARCHITECTURES["gpt2"]().run(), call=None)


@_difficult
def hf_hidden_states():
    case = ARCHITECTURES["bert"]()
    case.kwargs["output_hidden_states"] = True
    case.run()  # installs hooks that hold a ContextVar
    return case


@_difficult
def hf_pipeline():
    from transformers import AudioClassificationPipeline, Wav2Vec2FeatureExtractor
    from transformers import Wav2Vec2ForSequenceClassification as Classifier

    model = Classifier(Classifier.config_class(**SPEECH)).eval()
    pipe = AudioClassificationPipeline(
        model=model, feature_extractor=Wav2Vec2FeatureExtractor(), top_k=2
    )
    return Case(pipe, (np.sin(np.arange(800, dtype=np.float32)),))
