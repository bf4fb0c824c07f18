"""What a caller may say, and the refusal of everything else: a field that is not here is an error and never ignored."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from clipdit_serve.errors import field_error

Format = Literal["png", "webp", "jpeg"]
"""Of an answer's image."""

T = TypeVar("T", bound=BaseModel)

MAX_SEED = 2**63 - 1


def _no_text(value: Any) -> Any:
    """Forms cannot leave a field out that is shown: an empty one counts as left out."""
    return None if value == "" else value


OrNothing = BeforeValidator(_no_text)

# The bounds belong to the number inside: pydantic would apply those of the whole to None, too.
Seed = Annotated[
    Annotated[int, Field(ge=0, le=MAX_SEED)] | None,
    OrNothing,
    Field(description="Same image, seed and settings, same answer. Drawn if left out; the answer tells it."),
]
Guidance = Annotated[
    Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None,
    OrNothing,
    Field(description="Scale of classifier-free guidance; 1 is none, at half the cost."),
]
Steps = Annotated[
    Annotated[int, Field(ge=1)] | None, OrNothing, Field(description="Solver steps; the model's default if left out.")
]
Quality = Annotated[int, Field(ge=0, le=100, description="Of webp and jpeg.")]
VariantName = Annotated[
    str | None,
    OrNothing,
    Field(
        description="How the model is run, where the service offers several ways; the names after the colon in GET /v1/models."
    ),
]
ModelName = Annotated[str | None, OrNothing, Field(description="As GET /v1/models names it.")]


class TranslateFields(BaseModel):
    """Of POST /v1/translate: in the query, or beside the image in a form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName = None
    variant: VariantName = None
    seed: Seed = None
    steps: Steps = None
    guidance: Guidance = None
    quality: Quality = 95


class EditFields(BaseModel):
    """Of POST /v1/images/edits, as OpenAI names them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName = None
    prompt: Annotated[str, Field(max_length=32_000, description="Taken for compatibility, and without effect.")] = ""
    n: Annotated[int, Field(ge=1, le=1, description="One image an answer.")] = 1
    size: Annotated[Literal["auto"], Field(description="That of the upload.")] = "auto"
    quality: Annotated[Literal["auto"], Field(description="Set by num_inference_steps.")] = "auto"
    background: Annotated[Literal["auto", "opaque"], Field(description="Transparency is put on white.")] = "auto"
    response_format: Annotated[Literal["b64_json"], Field(description="In the answer itself.")] = "b64_json"
    output_format: Format = "png"
    output_compression: Quality = 95
    seed: Seed = None
    num_inference_steps: Steps = None
    guidance_scale: Guidance = None


def parse(fields: type[T], given: dict[str, Any]) -> T:
    """ApiError (unknown_field, invalid_value, missing_field) that names the first field at fault."""
    try:
        return fields.model_validate(given)
    except ValidationError as error:
        raise field_error(dict(error.errors()[0])) from None
