"""The loaders; a model is a list, so that a test sees what was done to it."""


class Model(list):
    """A model that can be marked."""


def load_model(path):
    """Load the bare model."""
    if path == "missing":
        raise FileNotFoundError("no such model: missing")
    return Model([path])


def load(path, tokenizer_config=None, adapter_path=None, return_config=False, **more):
    """Load a model and its tokenizer."""
    model = load_model(path)
    return (model, "tokenizer", {}) if return_config else (model, "tokenizer")


def sharded_load(repo, pipeline_group=None, tensor_group=None):
    """Load a model in parts; calls the other loader as upstream's does."""
    model, tokenizer = load(repo)
    load(repo)
    return model, tokenizer
