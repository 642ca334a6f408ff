# Not part of `all`: `snakemake apply`.
rule apply_shard:
    input:
        manifest=shard_manifest,
        model=applied_model,
    output:
        APPLIED,
    log:
        f"{LOGS}/apply/{{dataset}}/{{classifier}}/{{split}}/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/apply/{{dataset}}/{{classifier}}/{{split}}/{{shard}}.tsv"
    group:
        submission("apply_shard")
    threads: 8
    resources:
        gpu=gpus,
        device=RUNTIME.device,
        engine=RUNTIME.engine,
        workers=RUNTIME.workers,
    params:
        folder=lambda wildcards, input: str(Path(input.model[0]).parent),
        max_pixels=dataset_key("max_pixels"),
        code=code("predict", "predict_images"),
    shell:
        "cdul predict --model {params.folder:q} --manifest {input.manifest:q} "
        "--max-pixels {params.max_pixels} "
        "--device {resources.device:q} --gpus {resources.gpu} --engine {resources.engine} "
        "--workers={resources.workers} --threads {threads} --output {output:q} 2> {log:q}"


rule apply:
    input:
        applied_parts,
