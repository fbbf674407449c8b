.PHONY: check format

check: ## What CI runs, in an environment with `pip install -e ".[test]"`
	ruff check .
	ruff format --check .
	pytest

format: ## Mend what ruff can mend
	ruff check --fix .
	ruff format .
