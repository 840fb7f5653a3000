"""The Python API in cells, as in a notebook; tests/test_api.py runs it.

Editors open a file with `# %%` as a notebook. It takes seconds, for tiny-v3 is small.
"""

# ruff: noqa: T201
# %% [markdown]
# # Quantize a model and look at what it lost

# %%
import quantkit

MODEL = "builtin:tiny-v3"  # a folder or a hub id of your own
TEXT = {"fidelity.windows": 8, "fidelity.length": 128}  # short, for this example

# %% [markdown]
# ## The plan: no weight is read

# %%
[planned] = quantkit.plan(MODEL, method="rtn", overrides=TEXT)
print(f"{planned.totals.modules_quantized} modules, {planned.totals.bytes_after / 1e6:.2f} MB")

# %% [markdown]
# ## Build at 4 and 8 bits; each artifact holds the recipe that was chosen

# %%
with quantkit.show_progress() as progress:
    [four] = quantkit.build(
        MODEL,
        method="rtn",
        output="four",
        evaluate=False,
        overrides=TEXT,
        on_progress=progress,
    )
[eight] = quantkit.build(
    MODEL, method="rtn", bits=8, output="eight", evaluate=False, overrides=TEXT
)
print(four.path, four.fidelity.status)

# %% [markdown]
# ## Check the files, read the report, find the modules that lost most

# %%
quantkit.verify(four.path)
artifact = quantkit.open_artifact(four.path)
figures = artifact.report.distribution[0]
print("KL", figures.kl_mean)

# %%
modules = artifact.modules  # a pandas DataFrame if pandas is installed
worst = modules.nlargest(3, "relative_error")
print("worst module", worst.iloc[0].module)

# %% [markdown]
# ## Compare both

# %%
difference = quantkit.diff(four.path, eight.path)
print(type(difference).__name__)

# %% [markdown]
# ## Generate

# %%
model = quantkit.load(four.path, device="cpu")
print(type(model).__name__)
