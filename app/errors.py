"""Everything that can go wrong while answering, as one tree; `app/api/errors.py` is the one table to HTTP statuses.

    VitrineError
    ├── InputError                the client can mend it
    │   ├── MalformedRequestError     the request cannot be read (JSON, multipart, base64, no image)
    │   ├── InvalidValueError         readable, but a field has a value that cannot be used
    │   ├── TooLargeError             more bytes, pixels or images than the limits allow
    │   ├── SlowUploadError           the body comes more slowly than the server waits for
    │   ├── UnsupportedMediaError     not an image type that is read here
    │   ├── NotAcceptableError        the request accepts no form in which this can be answered
    │   ├── UndecodableImageError     an image type we read, but these bytes do not decode
    │   └── MalformedTokensError      a container of tokens that is cut off, damaged or of another version
    ├── ModelError
    │   ├── ModelNotFoundError        no such model or version
    │   ├── ModelNotChosenError       several models could answer and none was named
    │   └── ModelUnavailableError     known, but it cannot serve (fault in the repository, still loading)
    ├── AccessError               who asks may not
    │   ├── UnauthenticatedError      no API key, or one that is not known
    │   ├── ForbiddenError            an API key of another kind
    │   └── RateLimitedError          the API key's rate is used up; try again after `retry_after` seconds
    ├── CapacityError             full now; try again after `retry_after` seconds
    ├── ShuttingDownError         this process ends; another one answers, or this one's successor soon
    ├── DeadlineError             the request's time ran out
    └── BackendError              the engine failed
        ├── BackendUnavailableError   the inference server does not answer
        ├── UpstreamError             the server behind this one answered what nobody can use
        └── InferenceError            the engine rejected or failed this input

Decoding raises only input errors, backends only backend errors, always `raise ... from` the foreign exception.
"""

from typing import ClassVar, Literal

Full = Literal["requests", "bytes", "queue", "upstream"]
"""What is full: the requests in flight, the memory for their bodies, the queue of an engine, or the server behind this one."""


class VitrineError(Exception):
    """Base of the tree. `detail` is one sentence for the client that says what to do; `field` names the culprit."""

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    retry_after: float | None = None
    """Seconds after which the same request may be answered; None where nobody knows."""

    def __init__(self, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field


class InputError(VitrineError):
    code = "bad_input"
    title = "Bad input"


class MalformedRequestError(InputError):
    code = "malformed_request"
    title = "Malformed request"


class InvalidValueError(InputError):
    code = "invalid_value"
    title = "Invalid value"


class TooLargeError(InputError):
    code = "too_large"
    title = "Too large"


class SlowUploadError(InputError):
    code = "slow_upload"
    title = "Upload too slow"


class UnsupportedMediaError(InputError):
    code = "unsupported_media"
    title = "Unsupported media type"


class NotAcceptableError(InputError):
    code = "not_acceptable"
    title = "Not acceptable"


class UndecodableImageError(InputError):
    code = "undecodable_image"
    title = "Image cannot be decoded"


class MalformedTokensError(InputError):
    code = "malformed_tokens"
    title = "Tokens cannot be read"


class ModelError(VitrineError):
    code = "model_error"
    title = "Model error"


class ModelNotFoundError(ModelError):
    code = "model_not_found"
    title = "Model not found"


class ModelNotChosenError(ModelError):
    code = "model_not_chosen"
    title = "Model not chosen"


class ModelUnavailableError(ModelError):
    code = "model_unavailable"
    title = "Model unavailable"


class AccessError(VitrineError):
    code = "no_access"
    title = "No access"


class UnauthenticatedError(AccessError):
    """`presented` says whether there was a key at all."""

    code = "unauthenticated"
    title = "Unauthenticated"

    def __init__(self, detail: str, *, presented: bool = False) -> None:
        super().__init__(detail)
        self.presented = presented


class ForbiddenError(AccessError):
    code = "forbidden"
    title = "Forbidden"


class RateLimitedError(AccessError):
    code = "rate_limited"
    title = "Too many requests"

    def __init__(self, detail: str, *, retry_after: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class CapacityError(VitrineError):
    code = "full"
    title = "Server is full"

    def __init__(self, detail: str, *, retry_after: float = 1.0, reason: Full = "queue") -> None:
        super().__init__(detail)
        self.retry_after = retry_after
        self.reason = reason


class ShuttingDownError(VitrineError):
    code = "shutting_down"
    title = "Server is shutting down"
    retry_after = 1.0


class DeadlineError(VitrineError):
    code = "deadline_exceeded"
    title = "Deadline exceeded"


class BackendError(VitrineError):
    code = "backend_error"
    title = "Engine error"


class BackendUnavailableError(BackendError):
    code = "backend_unavailable"
    title = "Inference backend unavailable"
    retry_after = 1.0


class UpstreamError(BackendError):
    code = "upstream_failed"
    title = "Server behind this one failed"


class InferenceError(BackendError):
    code = "inference_failed"
    title = "Inference failed"
