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
REFUSALS = {"401": "No key, or none that is known", "403": "A key of another kind"}


def install(app: FastAPI) -> None:
    """Add the page and its files. Swagger UI styles its elements one by one and shows images that it was sent."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs.html", style_src="'self' 'unsafe-inline'", img_src="'self' data: blob:")

    app.mount("/docs/assets", Assets(directory=SWAGGER_UI), name="docs-assets")


def describe_keys(app: FastAPI) -> None:
    """Say in the description that routes want a key, so that Swagger UI asks for one."""
    describe = app.openapi

    def with_keys() -> dict[str, Any]:
        document = describe()
        document.setdefault("components", {})["securitySchemes"] = KEY_SCHEMES
        for path, operations in document["paths"].items():
            for operation in operations.values() if not is_open(path) else ():
                operation["security"] = [{name: []} for name in KEY_SCHEMES]
                shape = "ErrorsResponse" if "openai" in operation["tags"] else "ProblemResponse"
                content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
                operation["responses"] |= {
                    status: {"description": description, "content": content} for status, description in REFUSALS.items()
                }
        return document

    app.openapi = with_keys  # type: ignore[method-assign]
