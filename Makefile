.PHONY: check format oldest

check: ## What CI runs, in an environment with `pip install -e ".[test]"`
	ruff check .
	ruff format --check .
	pytest
	$(MAKE) oldest

oldest: ## Upstream's seams and short trainings on the oldest release that pyproject.toml allows, beside the installed one
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	version=$$(sed -n 's/.*"ultralytics>=\([0-9.]*\)".*/\1/p' pyproject.toml); \
	pip download --quiet --no-deps --dest "$$folder" "ultralytics==$$version"; \
	python -m zipfile -e "$$folder"/ultralytics-*.whl "$$folder/site"; \
	PYTHONPATH="$$folder/site" python -c "import ultralytics; assert ultralytics.__version__ == '$$version'"; \
	PYTHONPATH="$$folder/site" pytest -m oldest

format: ## Mend what ruff can mend
	ruff check --fix .
	ruff format .
