"""The model behind a registered pool, as MLflow runs it: this file is copied into every version.

MLflow executes it when the model is loaded (models from code), so nothing is pickled. It finds the pool
through ``manifest.json`` and ``pool.json`` beside it, with the code of the release that published it, which lies in
the version too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from sapt_core.versions.predictor import Predictor


class PoolModel(PythonModel):
    """Answers full prompts and shows which tasks' blocks it used."""

    predictor: Predictor

    def load_context(self, context: PythonModelContext) -> None:
        """Read the manifest and build the model from the store's verified blobs."""
        from cluster.store import open_store  # noqa: PLC0415
        from cluster.tracking.files import read_version  # noqa: PLC0415
        from sapt_core.versions.predictor import Predictor  # noqa: PLC0415

        files = Path(context.artifacts["manifest"]), Path(context.artifacts["pool"])
        manifest, store = read_version(*files, endpoint=None)  # the server's own: AWS_ENDPOINT_URL_S3
        self.predictor = Predictor.load(manifest, open_store(store))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Column ``prompt`` in; columns ``answer`` and ``weights`` (JSON: task -> attention weight) out."""
        predictions = self.predictor.predict(model_input["prompt"].tolist())
        return pd.DataFrame(
            {
                "answer": [prediction.text for prediction in predictions],
                "weights": [json.dumps(dict(prediction.weights)) for prediction in predictions],
            },
            index=model_input.index,
        )


mlflow.models.set_model(PoolModel())
