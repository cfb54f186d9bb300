"""Bodies that are forms with a file: the same fields as in JSON, each of them a text."""

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from gemma_jax.serving.errors import ApiError, refused
from gemma_jax.serving.fields import Fields

MOST_FIELDS, MOST_BYTES = 32, 1 << 16  # beside the file


async def read_form(
    http: HttpRequest, *, file: str, numbers: tuple[str, ...] = (), switches: tuple[str, ...] = ()
) -> tuple[Fields, bytes]:
    """The fields of a form, and the content of its one file.

    A name that ends in `[]` is a list.

    Args:
      file: Name of the field with the file.
      numbers, switches: Fields that are numbers, and those that are `true` or `false`.

    Raises:
      ApiError: No such form, no file or more than one, a field twice.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(
            f"expected Content-Type: multipart/form-data, got {kind!r:.80}",
            status=415,
            code="unsupported_media_type",
        )
    try:
        form = await http.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=MOST_BYTES)
    except HTTPException as error:
        raise refused(f"the body is no form that can be read: {error.detail!s:.200}") from None
    try:
        values: dict[str, object] = {}
        data = None
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != file:
                    raise refused(f"{name[:80]}: expected no file here", name[:80])
                data = await value.read()
            elif name.endswith("[]"):
                values.setdefault(name, []).append(_text(name, value))
            elif name in values:
                raise refused(f"{name[:80]}: is given twice", name[:80])
            else:
                values[name] = _value(name, _text(name, value), numbers, switches)
    finally:
        await form.close()
    if data is None:
        raise refused(f"{file}: is missing; expected a file", file)
    return Fields(values), data


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused(f"{name[:80]}: is not valid UTF-8", name[:80]) from None
    return value


def _value(name: str, text: str, numbers: tuple[str, ...], switches: tuple[str, ...]) -> object:
    if name in switches:
        return {"true": True, "false": False}.get(text.lower(), text)
    if name in numbers:
        try:
            return float(text)
        except ValueError:
            return text  # whoever reads the field says what was expected
    return text
