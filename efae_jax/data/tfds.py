"""A data set prepared by tensorflow-datasets in its ArrayRecord form, read without TensorFlow."""

from __future__ import annotations

from typing import Any

from efae_jax.data import labels
from efae_jax.data.labels import Table
from efae_jax.data.left_out import LeftOut
from efae_jax.errors import UserError
from efae_jax.paths import user_path


class TFDS:
    """The images (encoded bytes) and labels of a prepared data set.

    name: as tensorflow-datasets calls it, with configuration and version if need be
    ('imagenette/320px-v2:1.0.0'). split: its syntax ('train', 'train[:90%]').
    """

    def __init__(self, name: str, split: str, data_dir: str):
        self.dataset, self.split, self.data_dir = name, split, data_dir
        self._open()

    def _open(self) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                "data.source='tfds' needs the package: pip install tensorflow-datasets"
            ) from error
        builder = _builder(tfds, self.dataset, self.data_dir)
        features = builder.info.features
        images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
        classes = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
        if not images:
            raise UserError(f"data.path: {self.dataset!r} has no image; it has {list(features)}")
        self._image = "image" if "image" in images else images[0]
        others = [k for k in ("label", "labels", "class") if k in features]
        self._label = next((k for k in ("label", *classes, *others) if k in features), None)
        named = classes and self._label in classes
        self.num_classes = features[self._label].num_classes if named else 0
        # Numbers are what is stored; names say what they mean.
        self.class_names = tuple(features[self._label].names) if named else ()
        self.left_out = LeftOut()
        try:
            self._records = builder.as_data_source(
                split=self.split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        except ValueError as error:
            raise UserError(
                f"data: {self.dataset!r} has no split {self.split!r}; "
                f"allowed: {', '.join(builder.info.splits)} and slices such as 'train[:90%]'"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "split": self.split, "data_dir": self.data_dir}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        label = labels.parse(record[self._label] if self._label else None)
        return {"image": record[self._image], **Table(self.class_names).record(label)}

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"{self.dataset}/{self.split}[{index}]"


def _builder(tfds: Any, name: str, data_dir: str):
    where = user_path(data_dir) if data_dir else None
    arguments = f"{name!r}, {f'data_dir={where!r}, ' if where else ''}file_format='array_record'"
    try:
        builder = tfds.builder(name, data_dir=where, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"data.path: tensorflow-datasets knows no {name!r}"
            f"{f' and finds none prepared in {where!r}' if where else ''}; all names: "
            "https://www.tensorflow.org/datasets/catalog/overview"
        ) from error
    except Exception as error:  # it checks names, versions and formats in many places
        text = str(error).strip() or type(error).__name__
        if "ile format" in text:  # its default; reading that needs TensorFlow
            raise UserError(
                f"data.path: {name!r} was prepared in another form than ArrayRecord, the one that "
                "is read without TensorFlow; once, where TensorFlow is installed too: tfds "
                f"convert_format --root_data_dir={where or '~/tensorflow_datasets'} "
                "--out_file_format=array_record"
            ) from error
        raise UserError(
            f"data.path: tensorflow-datasets cannot open {name!r}: {text.splitlines()[0]}"
        ) from error
    if not builder.info.splits:
        raise UserError(
            f"data: {name!r} is not prepared; once, where TensorFlow is installed too: python -c "
            f'"import tensorflow_datasets as t; t.builder({arguments}).download_and_prepare()"'
        )
    return builder


def open_tfds(config: Any, split: str) -> TFDS:
    """The data set data.path, split data.train_split or data.test_split."""
    if not config.path:
        raise UserError("data.path: the name of a tensorflow-datasets data set, such as 'mnist'")
    name = config.train_split if split == "train" else config.test_split
    return TFDS(config.path, name, config.data_dir)
