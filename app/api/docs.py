"""`GET /docs`: Swagger UI on `/openapi.json`, with files of this server alone."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from app.api.keys import is_open
from app.api.pages import Assets, page

SWAGGER_UI = str(files("fastapi_offline") / "static")
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key"},
}
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/ProblemResponse"}
PROBLEM = {"application/problem+json": {"schema": PROBLEM_SCHEMA}}
OPENAI_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorsResponse"}}}
REFUSALS = {"401": "No key, or none that is known", "403": "A key of another kind"}


def install(app: FastAPI) -> None:
    """Add the page and its files, and mend what it shows. Swagger UI styles elements one by one and shows images it was sent."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs.html", style_src="'self' 'unsafe-inline'", img_src="'self' data: blob:")

    app.mount("/docs/assets", Assets(directory=SWAGGER_UI), name="docs-assets")
    _describe_exactly(app)


def _describe_exactly(app: FastAPI) -> None:
    """Say what FastAPI cannot: problems have a media type of their own."""
    describe = app.openapi

    def exactly() -> dict[str, Any]:
        document = describe()
        for operation in (operation for operations in document["paths"].values() for operation in operations.values()):
            for response in operation["responses"].values():
                _tell_problem(response.get("content", {}))
        return document

    app.openapi = exactly  # type: ignore[method-assign]


def _tell_problem(content: dict[str, Any]) -> None:
    """Move the problem out of what is told of `application/json`, where it stands alone or beside an answer."""
    schema = content.get("application/json", {}).get("schema", {})
    either = schema.get("anyOf", [schema])
    if PROBLEM_SCHEMA in either:
        content |= PROBLEM
        del content["application/json"]
        for answer in either:
            if answer != PROBLEM_SCHEMA:
                content["application/json"] = {"schema": answer}


def describe_keys(app: FastAPI) -> None:
    """Say in the description that routes want a key, so that Swagger UI asks for one."""
    describe = app.openapi

    def with_keys() -> dict[str, Any]:
        document = describe()
        document.setdefault("components", {})["securitySchemes"] = KEY_SCHEMES
        for path, operations in document["paths"].items():
            for operation in operations.values() if not is_open(path) else ():
                operation["security"] = [{name: []} for name in KEY_SCHEMES]
                content = OPENAI_ERROR if "openai" in operation["tags"] else PROBLEM
                operation["responses"] |= {
                    status: {"description": description, "content": content} for status, description in REFUSALS.items()
                }
        return document

    app.openapi = with_keys  # type: ignore[method-assign]
