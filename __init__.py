"""ComfyUI-Likeness: keep a subject's likeness while editing it, from one picture."""

WEB_DIRECTORY = "./web"  # js/ for the page, docs/ for the help pages


async def comfy_entrypoint():
    """Called by ComfyUI. Everything else is imported here, so that importing the package costs nothing."""
    from .nodes import LikenessExtension

    return LikenessExtension()
