"""The model behind a registered pool, as MLflow runs it: this file is copied into every version.

MLflow executes it when the model is loaded (models from code), so nothing is pickled. It finds the pool
through ``manifest.json`` and ``pool.json`` beside it, with the code of the release that published it, which lies in
the version too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from sapt_core.versions.predictor import Predictor
    from sapt_core.versions.requests import Row


class PoolModel(PythonModel):
    """Answers full prompts, or inputs of tasks, and shows which tasks' blocks it used."""

    predictor: Predictor

    def load_context(self, context: PythonModelContext) -> None:
        """Read the manifest and build the model from the store's verified blobs.

        That is the store that the version was published with, or ``SAPT_STORE`` of the environment: stores move.
        """
        from cluster.store import open_store  # noqa: PLC0415
        from cluster.tracking.files import read_version  # noqa: PLC0415
        from sapt_core.errors import StoreError  # noqa: PLC0415
        from sapt_core.versions.predictor import Predictor  # noqa: PLC0415

        files = Path(context.artifacts["manifest"]), Path(context.artifacts["pool"])
        moved = os.environ.get("SAPT_STORE") or None
        # The endpoint is the server's own: AWS_ENDPOINT_URL_S3.
        manifest, store = read_version(*files, endpoint=None, moved=moved)
        try:
            self.predictor = Predictor.load(manifest, open_store(store))
        except StoreError as error:
            error.add_note(f"It was looked for in {store.uri}; SAPT_STORE says where a store lies that has moved.")
            raise

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answer the rows of a request.

        Args:
            context: not used.
            model_input: columns ``prompt``, full prompts, or ``input`` and ``task``, inputs of learnt tasks; a table
                may have rows of both kinds.
            params: ``max_new_tokens`` and ``num_beams``, as ``Predictor.answer`` takes them; ``return_weights``:
                whether the reply has weights.

        Returns:
            Columns ``answer`` and, unless they are not wanted, ``weights`` (JSON: task -> attention weight), with the
            index of ``model_input``.

        Raises:
            MlflowException: with every fault of every row, which a server answers as HTTP 400.
        """
        from sapt_core.errors import RequestError  # noqa: PLC0415

        given = dict(params or {})
        weighed = given.pop("return_weights", True)
        try:
            rows = _rows(model_input)
            predictions = self.predictor.answer(rows, **given)
        except RequestError as error:
            raise mlflow.MlflowException.invalid_parameter_value(str(error)) from error
        columns = {"answer": [prediction.text for prediction in predictions]}
        if weighed:
            columns["weights"] = [json.dumps(dict(prediction.weights)) for prediction in predictions]
        return pd.DataFrame(columns, index=model_input.index if len(model_input) == len(rows) else None)


def _rows(table: pd.DataFrame) -> list[Row]:
    """The rows of a table, None where a cell is empty.

    Raises:
        RequestError: there is no column with texts, or columns that came as lists have not one length.
    """
    from sapt_core.errors import RequestError  # noqa: PLC0415
    from sapt_core.versions.requests import Row  # noqa: PLC0415

    title = "The request cannot be answered:"
    columns: dict[str, list[Any]] = {
        name: table[name].astype(object).where(table[name].notna(), None).tolist()
        for name in Row._fields
        if name in table
    }
    if "prompt" not in columns and "input" not in columns:
        raise RequestError(title, ["it has neither a column prompt, for full prompts, nor the columns input and task"])
    if len(table) == 1 and any(isinstance(cells[0], list) for cells in columns.values()):
        # MLflow 3.17 reads {"prompt": ["a", "b"]} as one row that holds the list.
        lists = {name: cells[0] for name, cells in columns.items() if isinstance(cells[0], list)}
        if len({len(cells) for cells in lists.values()}) > 1:
            lengths = ", ".join(f"{name} has {len(cells)}" for name, cells in lists.items())
            raise RequestError(title, [f"its columns must have one length: {lengths}"])
        length = len(next(iter(lists.values())))
        columns = {name: lists.get(name, cells * length) for name, cells in columns.items()}
    return [Row(**dict(zip(columns, cells, strict=True))) for cells in zip(*columns.values(), strict=True)]


mlflow.models.set_model(PoolModel())
