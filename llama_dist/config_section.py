"""What the sections of a config are made of: frozen settings, and the kinds of numbers and texts they take."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
UpToABillion = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Positive = Annotated[float, Field(strict=True, gt=0)]
PositiveOrZero = Annotated[float, Field(strict=True, ge=0)]
Ratio = Annotated[float, Field(strict=True, ge=0, le=1)]
Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Frozen settings; unknown names, NaN and infinity are errors, and the text under a field is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
