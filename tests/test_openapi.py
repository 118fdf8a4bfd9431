"""Test the OpenAPI document."""

from __future__ import annotations

import httpx

import eventstore


def test_the_openapi_document_is_valid_and_public_and_describes_every_route(client: httpx.Client) -> None:
    from openapi_spec_validator import validate

    response = client.get("/openapi.json", headers={"x-api-key": "unknown"})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    document = response.json()
    assert document["openapi"].startswith("3.1")
    validate(document)
    served = {(operation.public_path, operation.method.lower()) for operation in eventstore.OPERATIONS}
    assert len(served) == len(eventstore.OPERATIONS)
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == served
    for path, method in served:
        described = document["paths"][path][method]
        assert described["security"] == ([] if path in ("/health", "/openapi.json") else [{"ApiKey": []}])
        assert ("429" in described["responses"]) is (
            (path, method) in {("/v1/events", "post"), ("/v1/events/bulk", "post")}
        )
        if example := described.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example"):
            assert client.request(method, path, json=example).status_code in (200, 202)
