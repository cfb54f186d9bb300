// Files that go along with the next message: pictures, and sounds where the model hears.

const list = document.getElementById("attached");
const SOUNDS = { wav: "wav", "x-wav": "wav", wave: "wav", mpeg: "mp3", mp3: "mp3", flac: "flac",
  "x-flac": "flac", ogg: "ogg" }; // what browsers call them, and what the API does
let files = [];
let takes = [];

export function accept(modalities) {
  takes = ["image", "audio"].filter((one) => modalities.includes(one));
  return takes.map((one) => `${one}/*`).join(",");
}

// Returns what is wrong with them, or nothing.
export async function add(chosen) {
  for (const file of chosen) {
    const [kind, form] = file.type.split("/");
    if (!takes.includes(kind)) return `${file.name}: the model does not take such files.`;
    if (kind === "audio" && !SOUNDS[form]) return `${file.name}: expected WAV, MP3, FLAC or OGG.`;
    try {
      files.push({ name: file.name, kind, form: SOUNDS[form], url: await dataUrl(file) });
    } catch {
      return `${file.name} cannot be read.`;
    }
  }
  show();
}

// All of them, and none are left.
export function take() {
  const taken = files;
  files = [];
  show();
  return taken;
}

export function putBack(taken) {
  files = taken;
  show();
}

export const any = () => files.length > 0;

// A part of a message of the API.
export function part(file) {
  if (file.kind === "image") return { type: "image_url", image_url: { url: file.url } };
  const data = file.url.slice(file.url.indexOf(",") + 1);
  return { type: "input_audio", input_audio: { data, format: file.form } };
}

export function view(file) {
  if (file.kind !== "image") {
    const chip = document.createElement("span");
    chip.className = "chip";
    chip.textContent = `♪ ${file.name}`;
    return chip;
  }
  const image = document.createElement("img");
  image.src = file.url;
  image.alt = file.name;
  return image;
}

function show() {
  list.replaceChildren(
    ...files.map((file) => {
      const remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "×";
      remove.setAttribute("aria-label", `Remove ${file.name}`);
      remove.addEventListener("click", () => {
        files = files.filter((other) => other !== file);
        show();
      });
      const item = document.createElement("li");
      item.append(view(file), remove);
      return item;
    }),
  );
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}
