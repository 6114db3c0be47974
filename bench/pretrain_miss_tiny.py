"""How the weights in fastpeft/assets/miss-tiny were made: full training from random weights on phantoms of scanner "a".

    python bench/pretrain_miss_tiny.py --out runs/miss-tiny

The phantoms are drawn (nothing is downloaded), the vocabulary holds their words and common words of radiology questions, so that other
English questions encode too. First the two encoders learn to classify the answer from the first question state: from nothing, through a
decoder, they learn slowly (the plain run stood at its question-only loss after 1,200 steps). Then everything is trained as in any
`fastpeft train` with plan T/T/T. The folder written is a transformers folder; its README.md has the command and the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from tqdm import tqdm

from fastpeft.adapters import atomic_folder
from fastpeft.data import EpochSampler, VQACollator, VQADataset, save_tokenizer, train_tokenizer
from fastpeft.demo.phantom import make_phantoms
from fastpeft.plan import adapt, build
from fastpeft.runs import vqa
from fastpeft.runs.options import DataOptions
from fastpeft.runs.splits import load_splits
from fastpeft.runs.vqa import PREPROCESS, preprocess_for
from fastpeft.train import TrainConfig, Trainer

# common words of questions and answers about radiology images, written down by hand
WORDS = """
abdominal abnormal abnormalities above acute adrenal air airway along also aneurysm anterior any aorta aortic appear appearing appears
appendix arch area arteries artery ascending atrium atrophy axis axillary base basal beneath between bilateral bilaterally bladder bleed
bleeding blood blunted bone bones bony bowel breast bright bronchi bronchus calcification calcifications calcified cancer carcinoma cardiac
cardiomegaly cardiophrenic carina carotid catheter cause cavity central cerebellum cerebral chronic clavicle clear colon condition
consistent consolidation contents contour contrast cortex cortical costophrenic cranial cut cystic dark deep degenerative demonstrate
demonstrated dense density descending deviated deviation diagnosis diaphragm diffuse diffusion dilated dilation disc disease disorder
displaced displacement distal does done duodenum edema effusion effusions embolism emphysema enhancement enhancing enlarged enlargement
esophagus evidence evident extremities femoral femur fibrosis film finding findings fissure flair flattened fluid focal followed foreign
fracture fractures frontal function gallbladder gas gastric gastrointestinal gland gray great groove hemidiaphragm hemisphere hemispheres
hemorrhage hemothorax hepatic hernia herniation high hilar hilum hip hydrocephalus hyperdense hyperintense hyperintensity hypodense
hypointense iliac image images imaging increased indicate infarct infarction infarcted infection inferior infiltrate inflammation
intensity internal intestine intracranial ischemia ischemic it jejunum joint just kidneys knee large lateral level lesions ligament limb
line lines lobe lobes located location lucency lumbar lumen lymph lymphadenopathy magnetic malignant mandible marrow masses matter maxillary
medial mediastinal mediastinum medulla meninges mesenteric metastases metastasis metastatic midbrain middle midline more multiple muscle
muscles nasal neck necrosis necrotic neoplasm nerve node nodes nodular nodule nodules noncontrast nucleus obstruction occipital opacities
opacity opacification oral orbit orbital organs ovary pacemaker pancreas pancreatic pancreatitis parenchyma parietal pathology patient
patients pelvic penetrating pericardial perforation peripheral peritoneum pituitary place pleural pneumonia pneumothorax polyp pons portal
posterior present primary process prominent prostate proximal pulmonary radiograph radiology rectum reduced region regions renal resonance
result retroperitoneal rib ribs ring rotated round sacrum scan scans scapula sclerosis section segment seen sella septum sequence shadow
shift shifted should shoulder show showing shown shows sign signal signs sinus sinuses skull small soft space spinal spine spleen splenic
stenosis sternum stomach stone stones stroke structure structures subarachnoid subcutaneous subdural sulci superior surface suspicious
swelling swollen symmetric symmetrical system taken temporal tip tissue thalamus than their these thickened thickening thoracic thorax
thrombus thyroid tomography trachea tracheal transverse trauma tube tuberculosis tumor tumour type types ultrasound unilateral upper ureter
urinary uterus vascular vasculature vein veins vena cava ventricle ventricles ventricular vertebra vertebrae vertebral vessel vessels
visible visualized volume wall was weighted well were when which why wide widened width window with within would yet a b c d t1 t2 0 1 2 3
4 5 6 7 8 9 10 11 12 not be but by can could did do from has have he her his if into its less may most my name near non no of off often or
other our out over part per pa ap possible same she side sided since so some such t that the them there they this through to under used
very vs what where who will x xray yes you your left right mri ct white black
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/miss-tiny"))
    parser.add_argument("--encoder-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--asset", type=Path, help="where to write the model folder (default: OUT/model)")
    args = parser.parse_args()

    data = make_phantoms(args.out / "phantoms-a", "a", {"train": args.images, "validate": 100, "test": 100}, seed=args.seed)
    samples, held = load_splits(DataOptions(str(data)), read=vqa.read)
    texts = [text for s in samples for text in (s.question, s.answer)]
    tokenizer = train_tokenizer([*texts, *WORDS.split()], vocab_size=1280)
    ids = {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": tokenizer.sep_token_id}
    model = build("miss-tiny", pretrained=False, seed=args.seed, vocab_size=len(tokenizer), **ids)
    preprocess = preprocess_for(None, model)
    dataset = VQADataset(samples, preprocess, args.seed, tokenizer=tokenizer)
    torch.manual_seed(args.seed)
    if not args.resume:
        teach_encoders(model, dataset, args.encoder_steps, args.learning_rate)
    adapt(model, "T/T/T")
    config = TrainConfig(
        steps=args.steps,
        batch_size=64,
        questions_per_image=4,
        base_learning_rate=args.learning_rate,
        beta2=0.98,
        warmup=100,
        seed=args.seed,
        save_every=250,
        out=str(args.out / "run"),
        resume=args.resume,
    )
    trainer = Trainer(model, dataset, config, eval_dataset=VQADataset(held, preprocess))
    summary = trainer.fit()
    write_asset(args.asset or args.out / "model", model, tokenizer, preprocess, summary, args)


def teach_encoders(model, dataset: VQADataset, steps: int, rate: float) -> None:
    """Image and text encoder learn from a linear classifier over all answers, which is then thrown away."""
    answers = sorted({sample.answer.lower() for sample in dataset.samples})
    number = {answer: i for i, answer in enumerate(answers)}
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(answers))
    parameters = [*model.vision_model.parameters(), *model.text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.07, div_factor=100)
    sampler, collate, done = EpochSampler(dataset, 64, questions_per_image=4), VQACollator(dataset.tokenizer), 0
    model.train()
    with tqdm(total=steps, desc="encoders", unit="step") as bar:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for indices in sampler:
                batch = collate(dataset.__getitems__(indices))
                images = model.encode_images(batch["pixel_values"])
                states = model.encode_questions(batch["input_ids"], batch["attention_mask"], images, batch["image_index"])
                targets = torch.tensor([number[sample.answer.lower()] for sample in batch["samples"]])
                scores = head(states[:, 0])
                loss = torch.nn.functional.cross_entropy(scores, targets)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                done += 1
                bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{(scores.argmax(1) == targets).float().mean():.2f}", refresh=False)
                bar.update()
                if done == steps:
                    return


def write_asset(folder: Path, model, tokenizer, preprocess, summary: dict, args) -> None:
    """The transformers folder, weights in float16: half the size, and loaded as float32."""
    scores = {k: round(summary["eval"][k], 4) for k in ("open", "closed", "global", "majority", "majority_closed")}
    with atomic_folder(folder) as draft:
        model.config.architectures = ["BlipForQuestionAnswering"]
        model.to(torch.float16).save_pretrained(draft)
        save_tokenizer(tokenizer, draft)
        (draft / PREPROCESS).write_text(json.dumps(preprocess.to_dict()) + "\n")
        options = ("encoder_steps", "steps", "images", "learning_rate", "seed")
        command = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options)
        loss = f"loss {summary['loss_first']:.2f} -> {summary['loss_last']:.2f}"
        shown = ", ".join(f"{k} {v:.1%}" for k, v in scores.items())
        about = [
            "# miss-tiny",
            "",
            'A 64-pixel BLIP VQA model for tests and the demo, trained from random weights on self-made phantoms (scanner "a").',
            "",
            f"    python bench/pretrain_miss_tiny.py {command}",
            "",
            f"The last {summary['steps']} steps of 64 questions: {summary['seconds'] / 60:.0f} minutes on {summary['device']}, {loss}.",
            f"Accuracy on {summary['eval']['n']} questions on unseen images: {shown}.",
            "",
        ]
        (draft / "README.md").write_text("\n".join(about))


if __name__ == "__main__":
    main()
