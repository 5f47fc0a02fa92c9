// Browsers start no worker from a page that is a file, so there the search runs in a hidden frame.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement('iframe')
      frame.hidden = true
      this.scope = new Promise(resolve => {
        frame.onload = () => {
          const scope = frame.contentWindow
          scope.postMessage = data => this.dispatchEvent(new MessageEvent('message', { data }))
          const script = scope.document.createElement('script')
          script.src = url
          script.onload = () => resolve(scope)
          scope.document.body.append(script)
        }
      })
      document.body.append(frame)
    }

    postMessage(data) {
      this.scope.then(scope => scope.dispatchEvent(new MessageEvent('message', { data })))
    }
  }
}
