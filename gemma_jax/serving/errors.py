"""What a request is told that cannot be answered, in the form of the OpenAI API."""

from collections.abc import Mapping

LONGEST = 1000  # characters of a message


class ApiError(Exception):
    """Holds the answer to a request that is refused, or that failed.

    Attributes:
      status: Of HTTP.
      param: The field that is wrong, as a path: `messages[0].content`.
      code: One word for programs.
      headers: To be sent with it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict:
        """The JSON of it."""
        text = str(self)
        text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
        error = {"message": text, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be honoured as it is: 400."""
    return ApiError(message, param=param, code=code)


def too_many(message: str, retry_after: float, code: str) -> ApiError:
    """A request that may be sent again after so many seconds: 429."""
    headers = {"Retry-After": str(max(1, round(retry_after)))}
    return ApiError(message, status=429, kind="rate_limit_error", code=code, headers=headers)


def unavailable(message: str, retry_after: float = 5) -> ApiError:
    """The server is about to end: 503."""
    headers = {"Retry-After": str(max(1, round(retry_after)))}
    return ApiError(message, status=503, kind="server_error", code="unavailable", headers=headers)


def failed(message: str, status: int = 500) -> ApiError:
    """What is no fault of the request."""
    return ApiError(message, status=status, kind="server_error", code="failed")
