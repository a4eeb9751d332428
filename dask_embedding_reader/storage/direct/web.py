"""How web servers are asked: in the name of fsspec's client for them, as far as its options are understood."""

from __future__ import annotations

from collections.abc import Mapping

from dask_embedding_reader.storage.connections import FileSystem, careful_client
from dask_embedding_reader.storage.direct.http import Connections, Timeouts
from dask_embedding_reader.storage.direct.site import Address, NotDirectError, Site
from dask_embedding_reader.storage.retries import STALL_SECONDS


def find_web(filesystem: FileSystem, path: str) -> Address:
    """Return where a file of fsspec's ``HTTPFileSystem`` is."""
    url = filesystem.encode_url(path)
    address = str(url.origin())  # without a password
    if url.user is not None or url.password is not None:
        return Address(f"{address} with a password in the URL", url.raw_path_qs, _refuse_password)
    return Address(address, url.raw_path_qs, lambda: _make_site(filesystem, address))


def _refuse_password() -> Site:
    raise NotDirectError("aiohttp knows how to send it")


def _make_site(filesystem: FileSystem, address: str) -> Site:
    options = {**filesystem.client_kwargs, **filesystem.kwargs}
    if unknown := options.keys() - {"headers", "timeout"}:
        raise NotDirectError(f"aiohttp alone knows what to do with {', '.join(sorted(unknown))}")
    if filesystem.get_client is not careful_client:
        raise NotDirectError("it makes its sessions by a get_client of its own")
    given = {**filesystem.client_kwargs.get("headers", {}), **filesystem.kwargs.get("headers", {})}
    headers = {"user-agent": "dask-embedding-reader", "accept": "*/*"}
    headers |= {str(name).lower(): str(value) for name, value in given.items()}
    # Compressed on the way, a file has other bytes at these positions.
    headers |= {"accept-encoding": "identity"}
    timeouts = Timeouts(STALL_SECONDS, STALL_SECONDS, None)
    if "timeout" in options:
        timeout = options["timeout"]
        if timeout.connect is not None:
            raise NotDirectError("aiohttp alone knows a timeout for taking a connection from its pool")
        timeouts = Timeouts(timeout.sock_connect or timeout.total, timeout.sock_read or timeout.total, timeout.total)

    def make_headers(url: str, byte_range: str) -> Mapping[str, str]:
        del url
        return {**headers, "range": byte_range} if byte_range else headers

    return Site(address, make_headers, Connections(timeouts), is_web=True)
