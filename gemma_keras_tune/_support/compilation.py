"""JAX's cache of compiled programs."""


def use_compilation_cache(folder: str | None = None) -> str:
    """Let JAX keep compiled programs on disk, so that the next process need not compile again.

    A cache that the user has set up is left as it is.

    Args:
        folder: Where to keep them. Defaults to `gemma_keras_tune/jax` in the user's cache folder.

    Returns:
        The folder in use.
    """
    import jax
    import platformdirs

    there: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder is None and there:
        return there
    folder = folder or str(platformdirs.user_cache_path("gemma_keras_tune") / "jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
