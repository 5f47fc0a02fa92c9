// Runs an ONNX file of several depths on a picture. Everything that it shows of the file stands in its metadata.
import * as ort from './onnxruntime-web/ort.wasm.bundle.min.mjs'

const MODEL = 'ddnn_resnet20-int8.onnx'
const SAMPLES = ['cat', 'frog', 'airplane', 'automobile', 'deer', 'ship', 'truck']
const RUNS = 20 // that a time is the median of
const here = name => new URL(name, import.meta.url).href
const byId = id => document.getElementById(`demo-${id}`)
const setState = state => { document.body.dataset.demo = state } // for tests

ort.env.wasm.wasmPaths = { wasm: here('onnxruntime-web/ort-wasm-simd-threaded.wasm') }
ort.env.wasm.numThreads = 1 // more would need headers that a static site has not

// The metadata_props of a ModelProto, field 14, which onnxruntime-web does not show
function readMetadata(bytes) {
  const text = new TextDecoder()
  const fields = function * (view) {
    let at = 0
    const varint = () => {
      let value = 0
      for (let shift = 1; ; shift *= 128) {
        const byte = view[at++]
        value += (byte & 127) * shift
        if (byte < 128) return value
      }
    }
    while (at < view.length) {
      const tag = varint()
      if (tag % 8 === 0) varint()
      else if (tag % 8 === 2) {
        const length = varint()
        yield [Math.floor(tag / 8), view.subarray(at, at += length)]
      } else throw new Error(`${MODEL} is no ONNX file`)
    }
  }
  const metadata = {}
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue
    const [key, value] = [...fields(entry)].map(([, part]) => text.decode(part))
    try {
      metadata[key] = JSON.parse(value)
    } catch {
      metadata[key] = value
    }
  }
  return metadata
}

function toTensor(pixels, { mean, std, input_size: [channels, height, width] }) {
  const values = new Float32Array(channels * height * width)
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < height * width; i++) values[c * height * width + i] = (pixels[4 * i + c] / 255 - mean[c]) / std[c]
  }
  return new ort.Tensor('float32', values, [1, channels, height, width])
}

function softmax(logits) {
  const most = Math.max(...logits)
  const exponentials = logits.map(value => Math.exp(value - most))
  const sum = exponentials.reduce((a, b) => a + b)
  return exponentials.map(value => value / sum)
}

async function start() {
  const answer = await fetch(here(MODEL))
  if (!answer.ok) throw new Error(`${MODEL}: ${answer.status}`)
  const bytes = new Uint8Array(await answer.arrayBuffer())
  const metadata = readMetadata(bytes)
  const session = await ort.InferenceSession.create(bytes)
  const rows = [...metadata.depths].reverse() // the shallowest first, as the slider has it
  const context = byId('picture').getContext('2d', { willReadFrequently: true })
  const slider = byId('depth')
  const cells = new Map()
  let newest = 0

  slider.max = rows.length - 1
  slider.value = slider.max
  for (const row of rows) {
    const line = byId('depths').tBodies[0].insertRow()
    for (const text of [row.depth, '', '', (row.macs / 1e6).toFixed(1), row.top1.toFixed(2)]) line.insertCell().textContent = text
    line.dataset.depth = row.depth
    cells.set(row.depth, line.cells)
  }
  byId('bytes').textContent = `One file of ${bytes.length.toLocaleString('en')} bytes serves all depths.`

  const run = async (images, depth) => {
    const feeds = { images, depth: new ort.Tensor('int64', [BigInt(depth)], []) }
    const times = []
    let logits
    for (let i = 0; i < RUNS; i++) {
      const begin = performance.now()
      logits = [...(await session.run(feeds)).logits.data]
      times.push(performance.now() - begin)
    }
    return { logits, ms: times.sort((a, b) => a - b)[RUNS / 2] }
  }

  const show = (depth, { logits, ms }) => {
    const best = softmax(logits).map((p, i) => [p, metadata.label_names[i]]).sort(([a], [b]) => b - a).slice(0, 3)
    cells.get(depth)[1].textContent = best[0][1]
    cells.get(depth)[2].textContent = ms.toFixed(2)
    cells.get(depth)[0].parentElement.dataset.logits = JSON.stringify(logits)
    return best
  }

  // Answers for the picture on the canvas, that of the chosen depth first; a newer picture or depth ends it
  const classify = async () => {
    const turn = ++newest
    const chosen = rows[slider.value].depth
    byId('depth-name').value = chosen
    slider.ariaValueText = `depth ${chosen}`
    for (const [depth, [first]] of cells) first.parentElement.classList.toggle('chosen', depth === chosen)
    setState('busy')
    const { width, height } = context.canvas
    const images = toTensor(context.getImageData(0, 0, width, height).data, metadata)
    for (const depth of [chosen, ...rows.map(row => row.depth).filter(depth => depth !== chosen)]) {
      const result = await (last = last.catch(() => {}).then(() => turn === newest ? run(images, depth) : null))
      if (turn !== newest) return
      const best = show(depth, result)
      if (depth === chosen) {
        byId('classes').replaceChildren(...best.map(([p, name]) => {
          const item = document.createElement('li')
          item.textContent = `${name} ${(100 * p).toFixed(1)} %`
          item.style.background = `linear-gradient(90deg, var(--md-code-bg-color) ${100 * p}%, transparent 0)`
          return item
        }))
      }
    }
    setState('done')
  }
  let last = Promise.resolve() // a session runs one call at a time

  const draw = async source => {
    let picture
    try {
      picture = await createImageBitmap(source)
    } catch {
      byId('status').textContent = `${source.name ?? 'That'} is no picture that this browser can read.`
      return setState('done')
    }
    byId('status').textContent = ''
    const { width, height } = context.canvas
    const side = Math.min(picture.width, picture.height)
    context.imageSmoothingQuality = 'high'
    context.fillStyle = '#fff'
    context.fillRect(0, 0, width, height)
    context.drawImage(
      picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side, 0, 0, width, height)
    await classify()
  }
  const drawSample = async image => { // from the page, which may be offline by now
    setState('busy')
    await image.decode()
    await draw(image)
  }

  for (const name of SAMPLES) {
    const label = document.createElement('label')
    const radio = Object.assign(document.createElement('input'), { type: 'radio', name: 'sample', value: name })
    const image = Object.assign(new Image(), { src: here(`samples/${name}.png`), alt: '' })
    radio.addEventListener('change', () => drawSample(image))
    label.append(radio, image, name)
    byId('samples').append(label)
  }
  const drawFile = file => {
    if (!file) return
    for (const radio of document.getElementsByName('sample')) radio.checked = false
    setState('busy')
    draw(file)
  }
  byId('file').addEventListener('change', event => drawFile(event.target.files[0]))
  for (const [name, over] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
    byId('drop').addEventListener(name, event => {
      event.preventDefault()
      byId('drop').classList.toggle('over', over)
      if (name === 'drop') drawFile(event.dataTransfer.files[0])
    })
  }
  slider.addEventListener('input', classify)

  byId('body').hidden = false
  document.getElementsByName('sample')[0].checked = true
  await drawSample(byId('samples').querySelector('img'))
}

start().catch(error => {
  byId('status').textContent = `The page cannot run: ${error.message}`
  throw error
})
