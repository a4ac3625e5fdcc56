"""The Kubernetes API as we use it: pages of a list, events of a watch, the store's version, and clear errors.

The one importer of `kubernetes`. Works on plain JSON, since the client's models cost 20 times the time and memory.
Never retries and never writes; `follow` decides what to do next. Permissions: list and watch on pods, services
and nodes.
"""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import orjson
import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from collector.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.cluster.records import Kind

PAGE_OBJECTS = 500
CONNECT_SECONDS_MAX = 10.0
LIST_READ_SECONDS_MAX = 60.0
WATCH_SILENCE_SECONDS = 15.0
UNAUTHORIZED, FORBIDDEN, GONE = 401, 403, 410
METHODS: dict[Kind, str] = {
    "pods": "list_pod_for_all_namespaces",
    "services": "list_service_for_all_namespaces",
    "nodes": "list_node",
}


class ApiError(Exception):
    """A request failed; the same request may work later.

    Attributes:
        reason: label for the metric: unauthorized, forbidden, refused, unreachable or unreadable.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ExpiredError(Exception):
    """The API server no longer has the version to go on from (410, in any of its three forms)."""


def connect(kubeconfig: str) -> client.CoreV1Api:
    """Return a client with fresh credentials: a kubeconfig's, else the pod's own, else ~/.kube/config's.

    The client itself reads the pod's token file again every minute. SettingsError when there are no credentials.
    """
    settings = client.Configuration()
    try:
        if not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(kubeconfig or None, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise SettingsError(
            f"No way to the Kubernetes API: {error}.",
            "set PODWIRE_KUBECONFIG, run in a pod with a service account, or set PODWIRE_MANIFESTS",
        ) from error
    settings.retries = False
    return client.CoreV1Api(client.ApiClient(settings))


class Api:
    """Requests to one API server; safe for several threads.

    `reconnect` returns a `CoreV1Api`; it's called at the start and after each 401, so that credentials are read again.
    """

    def __init__(
        self, reconnect: Callable[[], Any], watch_silence_seconds: float = WATCH_SILENCE_SECONDS
    ) -> None:
        self._reconnect = reconnect
        self._watch_silence_seconds = watch_silence_seconds
        self._client = reconnect()

    def pages(self, kind: Kind) -> Iterator[tuple[list[Any], str]]:
        """Yield (objects, resourceVersion) per page of a quorum list; all pages show the first one's version."""
        token = None
        while True:
            page = self._list(kind, limit=PAGE_OBJECTS, _continue=token)
            token = page["metadata"].get("continue") or None
            yield page.get("items") or [], page["metadata"]["resourceVersion"]
            if token is None:
                return

    def version(self, kind: Kind) -> str:
        """Return the store's resourceVersion now, by a quorum list of one object."""
        return str(self._list(kind, limit=1)["metadata"]["resourceVersion"])

    @contextmanager
    def watch(self, kind: Kind, version: str, timeout_seconds: int) -> Iterator[Watch]:
        """Open a watch from a version; the server ends it after the timeout, we a little later if it's silent."""
        read_seconds = timeout_seconds + self._watch_silence_seconds
        response = self._request(
            kind,
            read_seconds,
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=timeout_seconds,
        )
        try:
            yield Watch(response)
        finally:
            response.close()

    def _list(self, kind: Kind, **query: Any) -> Any:
        response = self._request(kind, LIST_READ_SECONDS_MAX, **query)
        with _translated():
            text = response.data
            gc.disable()  # a collection per few thousand new dicts costs as much as the parsing
            try:
                page = orjson.loads(text)
            finally:
                gc.enable()
        if not _version(page):
            raise ApiError("unreadable", f"no list came for {kind}")
        return page

    def _request(self, kind: Kind, read_seconds: float, **query: Any) -> Any:
        """Return the open response; ApiError or ExpiredError for any other status than 2xx."""
        try:
            with _translated():
                return getattr(self._client, METHODS[kind])(
                    _preload_content=False, _request_timeout=(CONNECT_SECONDS_MAX, read_seconds), **query
                )
        except ApiError as error:
            if error.reason == "unauthorized":
                self._client = self._reconnect()
            raise


class Watch:
    """An open watch."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def events(self) -> Iterator[tuple[str, Any]]:
        """Yield (ADDED, MODIFIED, DELETED or BOOKMARK, object) until the server ends the watch in order.

        ExpiredError for an ERROR event of 410; ApiError for others, a cut connection or silence.
        """
        rest = b""
        with _translated():
            for chunk in self._response.stream(amt=None):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _event(orjson.loads(line))

    def cancel(self) -> None:
        """End a read that waits in another thread; a watch that has just ended by itself has no socket any more."""
        with suppress(ValueError, OSError):
            self._response.shutdown()


def _version(document: Any) -> Any:
    """Return metadata.resourceVersion of whatever came, None without one."""
    metadata = document.get("metadata") if isinstance(document, dict) else None
    return metadata.get("resourceVersion") if isinstance(metadata, dict) else None


def _event(event: Any) -> tuple[str, Any]:
    if not isinstance(event, dict) or not isinstance(event.get("object"), dict):
        raise ApiError("unreadable", "an event without an object came")
    kind, item = event.get("type"), event["object"]
    if kind == "ERROR":
        if item.get("code") == GONE:
            raise ExpiredError
        raise ApiError("refused", f"{item.get('reason')}: {item.get('message')}")
    if not isinstance(kind, str) or not _version(item):
        raise ApiError("unreadable", f"an event of type {kind} came without a version")
    return kind, item


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what the client library raises into ApiError and ExpiredError."""
    try:
        yield
    except ApiException as error:
        if error.status == GONE:
            raise ExpiredError from error
        reason = {UNAUTHORIZED: "unauthorized", FORBIDDEN: "forbidden"}.get(error.status, "refused")
        raise ApiError(reason, _message(error)) from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ApiError("unreachable", f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ApiError("unreadable", f"{type(error).__name__}: {error}") from error


def _message(error: Any) -> str:
    """Return the Status message of an error's body, for example which permission is missing."""
    try:
        return f"{error.status} {orjson.loads(error.body)['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.status} {error.reason}"
