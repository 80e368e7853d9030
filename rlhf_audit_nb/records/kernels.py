"""The kernels that are installed here. Floor 3.

Apart from the engine, which papermill imports while it is being imported itself: whoever asks before papermill is
there asks here.
"""

from __future__ import annotations

from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from rlhf_audit_nb.errors import RecordError

__all__ = ["kernel_named"]


def kernel_named(kernel_name: str) -> dict[str, str]:
    """Name, language and display name of an installed kernel.

    Raises:
        RecordError: no kernel has that name.
    """
    try:
        spec = KernelSpecManager().get_kernel_spec(kernel_name)
    except NoSuchKernel as error:
        raise RecordError(
            f"No kernel named {kernel_name!r} is installed here, so the notebook cannot run.",
            next_step="Install it (for Python: python -m ipykernel install --user), or name another with --kernel.",
            code="no-kernel",
        ) from error
    return {"name": kernel_name, "language": spec.language, "display_name": spec.display_name}
